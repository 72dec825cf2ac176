"""Attention in plain PyTorch: the definition that a fused kernel must match, on any device.

Queries are taken in chunks, each of which gathers the keys that any of its queries sees, and the
backward pass computes the probabilities of a chunk again: memory is O(chunk x L).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.patterns import Pattern
from kernels.patterns.tiles import TileList

CHUNK = {
    "cpu": 64,
    "cuda": 256,
}  # queries: a short chunk gathers few keys, a long one fills a GPU
KEPT_CELLS = 2**26  # of one pattern's mask, 64 MiB; evaluating it takes a third of the time


@torch.compiler.disable
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: "Mask", scale: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``kernels.attend.attend`` after its checks; computes in float32, or float64 for float64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    out, lse = _Attend.apply(q, k, v, mask, scale)
    return out.to(out_dtype), lse


def _without_autocast(function):
    """Compute in the dtype of the inputs, also where the caller's products are autocast."""

    @functools.wraps(function)
    def exact(ctx, tensor, *rest):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(ctx, tensor, *rest)

    return exact


class _Attend(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(ctx, q, k, v, mask, scale):
        out = v.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[:3])
        for rows, columns, visible in mask.chunks():
            unseen = ~visible.any(dim=2)
            k_chunk, v_chunk = (_gather(x, columns, unseen) for x in (k, v))
            score = _scores(q[:, :, rows], k_chunk, visible, scale)
            largest = score.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
            weight = score.sub_(largest).exp_()  # 0 where nothing is visible: exp(-inf)
            total = weight.sum(dim=-1, keepdim=True)
            out[:, :, rows] = weight @ v_chunk / total.masked_fill(total == 0, 1)
            lse[:, :, rows] = (largest + total.log())[..., 0]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale = mask, scale
        return out, lse

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        blind = torch.isneginf(lse)  # queries without a visible key: no gradient
        lse = lse.masked_fill(blind, float("inf"))
        # dS = P (dP - (delta - dlse)), with delta = sum of dout * out over Dv.
        shift = ((dout * out).sum(dim=-1) - dlse).masked_fill(blind, 0)
        for rows, columns, visible in ctx.mask.chunks():
            unseen = ~visible.any(dim=2)
            k_chunk, v_chunk = (_gather(x, columns, unseen) for x in (k, v))
            score = _scores(q[:, :, rows], k_chunk, visible, ctx.scale)
            p = score.sub_(lse[:, :, rows, None]).exp_()
            dp = dout[:, :, rows] @ v_chunk.mT
            ds = p * dp.sub_(shift[:, :, rows, None]) * ctx.scale
            ds.masked_fill_(~visible, 0)  # 0 * inf, where an unseen value is huge
            dq[:, :, rows] = ds @ k_chunk
            _scatter_add(dk, columns, ds.mT @ q[:, :, rows])
            _scatter_add(dv, columns, p.mT @ dout[:, :, rows])
        return dq, dk, dv, None, None


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    return (q @ k.mT).mul_(scale).masked_fill_(~visible, float("-inf"))


@dataclass(frozen=True, eq=False)
class Mask:
    """What is visible, chunk of queries by chunk."""

    pattern: Pattern
    heads: int
    queries: int
    keys: int
    device: torch.device
    documents: Tensor | None  # (B, L)
    q_position: Tensor | None  # (B | 1, H | 1, Lq)
    k_position: Tensor | None  # (B | 1, Hkv | 1, Lk)
    tiles: TileList | None

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield ``rows``, ``columns (H | 1, K)`` and ``visible (B | 1, H | 1, rows, K)``.

        No key outside ``columns`` is visible to any of the rows.
        """
        size = CHUNK[self.device.type]
        starts = range(0, self.queries, size)
        if self.q_position is None and self.k_position is None:
            columns, visible = _pattern_chunks(
                self.pattern,
                self.heads,
                self.queries,
                self.keys,
                size,
                str(self.device),
            )
        else:
            columns = [torch.arange(self.keys, device=self.device)[None]] * len(starts)
            visible = None
        kept = visible is not None and self.documents is None and self.tiles is None
        for n, start in enumerate(starts):
            rows = slice(start, min(start + size, self.queries))
            yield (
                rows,
                columns[n],
                visible[n] if kept else self._visible(rows, columns[n]),
            )

    def _visible(self, rows: slice, columns: Tensor) -> Tensor:
        storage_i = torch.arange(rows.start, rows.stop, device=self.device)[None, None, :, None]
        storage_j = columns[None, :, None, :]
        i = storage_i if self.q_position is None else self.q_position[:, :, rows, None]
        j = storage_j if self.k_position is None else self._spread(self.k_position)[:, :, None]
        head = torch.arange(self.heads)[None, :, None, None] if self.pattern.differs_by_head else 0
        visible = self.pattern.visible(i, j, head, length=self._length)
        if self.documents is not None:
            of_query = self.documents[:, None, rows, None]
            visible = visible & (of_query == self.documents[:, columns][:, :, None])
        if self.tiles is not None:
            row = torch.arange(self.tiles.heads, device=self.device)[None, :, None, None]
            tile_i, tile_j = (
                storage_i // self.tiles.tile[0],
                storage_j // self.tiles.tile[1],
            )
            visible = visible & self._layout[row, tile_i, tile_j]
        return visible

    @functools.cached_property
    def _length(self) -> int:
        """Tokens of the sequence that queries and keys are from."""
        last = max(self.queries, self.keys) - 1
        positions = [p for p in (self.q_position, self.k_position) if p is not None]
        return 1 + max([last, *(int(p.max()) for p in positions)])

    @functools.cached_property
    def _layout(self) -> Tensor:
        return self.tiles.layout().to(self.device)

    def _spread(self, position: Tensor) -> Tensor:
        """Positions of the key heads, one for each query head that shares them."""
        heads = position.shape[1]
        return position if heads == 1 else position.repeat_interleave(self.heads // heads, dim=1)


@functools.lru_cache(maxsize=48)
def _pattern_chunks(
    pattern: Pattern, heads: int, queries: int, keys: int, chunk: int, device: str
) -> tuple[list[Tensor], list[Tensor] | None]:
    """For every chunk of queries the keys that it sees, and which cells those are.

    Returns:
        ``columns (heads | 1, K)`` of each chunk: heads that see fewer keys than others are filled
        up with keys that they do not see, and no key stands twice in a row; and ``visible
        (1, heads | 1, rows, K)`` of each, or None if that would be more than ``KEPT_CELLS``.
    """
    head = torch.arange(heads)[:, None, None] if pattern.differs_by_head else 0
    j = torch.arange(keys, device=device)[None, None, :]
    columns, visible, cells = [], [], 0
    for i in torch.arange(queries, device=device)[None, :, None].split(chunk, dim=1):
        seen = pattern.visible(i, j, head, length=max(queries, keys))  # (heads | 1, rows, Lk)
        live = seen.any(dim=1)
        most = max(int(live.sum(dim=1).max()), 1)
        columns.append(live.int().argsort(dim=1, descending=True, stable=True)[:, :most])
        cells += columns[-1].numel() * i.numel()
        if cells <= KEPT_CELLS:
            visible.append(seen.take_along_dim(columns[-1][:, None], dim=2)[None])
        else:
            visible.clear()
    return columns, visible if cells <= KEPT_CELLS else None


def _gather(x: Tensor, columns: Tensor, unseen: Tensor) -> Tensor:
    """``(B, H, L, D)`` and ``(H | 1, K)`` -> ``(B, H, K, D)``, with 0 where ``unseen``.

    ``unseen`` is ``(B | 1, H | 1, K)``: what no query of the chunk sees may not leak, not even as
    0 * NaN.
    """
    if len(columns) == 1:
        gathered = x.index_select(2, columns[0])
    else:
        gathered = x.flatten(1, 2).index_select(1, _flat(columns, x)).unflatten(1, columns.shape)
    return gathered.masked_fill_(unseen[..., None], 0)


def _scatter_add(x: Tensor, columns: Tensor, part: Tensor) -> None:
    """Add ``part (B, H, K, D)`` to the rows that ``_gather`` took from ``x``.

    A key stands once in a row of ``columns``: the sums have one order, the same in every run.
    """
    if len(columns) == 1:
        x.index_add_(2, columns[0], part)
    else:
        x.flatten(1, 2).index_add_(1, _flat(columns, x), part.flatten(1, 2))


def _flat(columns: Tensor, x: Tensor) -> Tensor:
    """Row numbers in ``x.flatten(1, 2)``."""
    first = torch.arange(x.shape[1], device=x.device)[:, None] * x.shape[2]
    return (first + columns).flatten()
