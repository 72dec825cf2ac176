"""Attention in plain PyTorch: the definition that a fused kernel must match, on any device.

Queries are taken in chunks, each of which gathers the keys that any of its queries sees, and the
backward pass computes the probabilities of a chunk again: memory is O(chunk x L).
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.attend.call import Call
from kernels.attend.launch import empty_gradient
from kernels.common.documents import first_tokens
from kernels.common.kept import kept
from kernels.patterns import Pattern

CHUNK = {"cpu": 64, "cuda": 256}  # queries: a short chunk gathers few keys, a long one fills a GPU
KEPT_CELLS = 2**26  # of one pattern's mask, 64 MiB; evaluating it takes a third of the time


def _without_autocast(function):
    """Compute in the dtype of the inputs, also where the caller's products are autocast."""

    @functools.wraps(function)
    def exact(tensor, *rest):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *rest)

    return exact


@_without_autocast
def forward(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of ``kernels.attend.attend``; the arguments are those of a flat ``Call``."""
    return formula(q, k, v, Call.rebuild(*arguments))


def formula(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, differentiable any number of times; in float32, or float64 for float64."""
    q, k, v = _wide(q, k, v)
    out, lse = [], []
    for rows, columns, visible in _chunks(call, q, k):
        unseen = ~visible.any(dim=2)
        k_chunk, v_chunk = (_gather(x, columns, unseen) for x in (k, v))
        score = _scores(q[:, :, rows], k_chunk, visible, call.scale)
        largest = score.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
        weight = score.sub_(largest).exp_()  # 0 where nothing is visible: exp(-inf)
        total = weight.sum(dim=-1, keepdim=True)
        blind = total == 0
        total = total.masked_fill(blind, 1)
        out.append((weight @ v_chunk / total).transpose(1, 2))
        lse.append((largest + total.log()).masked_fill(blind, float("-inf"))[..., 0])
    # In (B, L, H, Dv) memory, as that of the kernels.
    return torch.cat(out, dim=1).transpose(1, 2).to(call.out_dtype), torch.cat(lse, dim=2)


@_without_autocast
def backward(dout: Tensor, dlse: Tensor | None, q, k, v, out: Tensor, lse: Tensor, *arguments):
    """``(dq, dk, dv)`` from the gradients of ``out`` and ``lse`` (None if that was not used)."""
    call, kv_group = Call.rebuild(*arguments), q.shape[1] // k.shape[1]
    wide_q, wide_k, wide_v = _wide(q, k, v)
    dq, dk, dv = torch.empty_like(wide_q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    dout = dout.to(wide_q.dtype)
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    blind = torch.isneginf(lse)  # queries without a visible key: no gradient
    lse, dlse = lse.masked_fill(blind, float("inf")), dlse.masked_fill(blind, 0)
    for rows, columns, visible in _chunks(call, wide_q, wide_k):
        unseen = ~visible.any(dim=2)
        k_chunk, v_chunk = (_gather(x, columns, unseen) for x in (wide_k, wide_v))
        score = _scores(wide_q[:, :, rows], k_chunk, visible, call.scale)
        p = score.sub_(lse[:, :, rows, None]).exp_().masked_fill_(~visible, 0)
        dp = dout[:, :, rows] @ v_chunk.mT
        dp.masked_fill_(~visible, 0)  # 0 * inf, where an unseen value is huge
        # dS = P (dP - (delta - dlse)), with delta = sum of P dP over the keys.
        delta = (p * dp).sum(dim=-1, keepdim=True)
        ds = dp.sub_(delta - dlse[:, :, rows, None]).mul_(p).mul_(call.scale)
        ds.masked_fill_(~visible, 0)  # again, where a row of gradients is not finite
        dq[:, :, rows] = ds @ k_chunk
        _scatter_add(dk, columns, ds.mT @ wide_q[:, :, rows])
        _scatter_add(dv, columns, p.mT @ dout[:, :, rows])
    dk, dv = (x.unflatten(1, (-1, kv_group)).sum(dim=2) for x in (dk, dv))
    return tuple(empty_gradient(x).copy_(dx) for x, dx in ((q, dq), (k, dk), (v, dv)))


def _wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of the sums, and with a key head for each query head."""
    dtype, kv_group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(kv_group, dim=1) for x in (k, v))
    return tuple(x.to(dtype).contiguous() for x in (q, k, v))


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    return (q @ k.mT).mul_(scale).masked_fill_(~visible, float("-inf"))


def _chunks(call: Call, q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """What is visible, chunk of queries by chunk; keys have as many heads as queries here.

    In here a document is known by its first token.

    Yields ``rows``, ``columns (H | 1, K)`` and ``visible (B | 1, H | 1, rows, K)``: no key outside
    of ``columns`` is visible to any of the rows.
    """
    heads, num_queries, num_keys, device = q.shape[1], q.shape[2], k.shape[2], q.device
    starts = range(0, num_queries, CHUNK[device.type])
    rows = [slice(start, min(start + CHUNK[device.type], num_queries)) for start in starts]
    if call.documents is not None:
        starts = first_tokens(call.documents)
        several = bool(starts.any())
        call = call._replace(documents=starts if several else None)
    given = call.documents, call.q_position, call.k_position, call.tiles
    if all(x is None for x in given):
        size = CHUNK[device.type]
        columns, visible = _pattern_chunks(
            call.pattern, heads, num_queries, num_keys, size, str(device)
        )
        if visible is not None:
            yield from zip(rows, columns, visible, strict=True)
            return
    evaluate = _visibility(call, heads, max(num_queries, num_keys), device)
    if all(x is None for x in given):
        for chunk, own in zip(rows, columns, strict=True):
            yield chunk, own, evaluate(chunk, own)
        return
    for chunk in rows:
        every = torch.arange(*_span(call, chunk, num_keys), device=device)[None]
        seen = evaluate(chunk, every)
        live = _filled_up(seen.any(dim=2).any(dim=0))
        yield chunk, every[0, live], seen.take_along_dim(live[None, :, None], dim=3)


def _span(call: Call, rows: slice, num_keys: int) -> tuple[int, int]:
    """The first key that any of the rows may see, and one past the last."""
    if call.documents is None:
        return 0, num_keys
    first, last = (call.documents[:, n, None] for n in (rows.start, rows.stop - 1))
    before, after = (call.documents < first).sum(dim=1), (call.documents > last).sum(dim=1)
    hidden = num_keys - rows.stop if call.pattern.is_causal and call.q_position is None else 0
    return int(before.min()), num_keys - max(int(after.min()), hidden)


def _visibility(
    call: Call, heads: int, length: int, device: torch.device
) -> Callable[[slice, Tensor], Tensor]:  # fmt: skip
    """A function of ``rows`` and ``columns (H | 1, K)`` that tells the visible cells of a chunk.

    Args:
        length: the most that there are of queries or keys.
    """
    pattern, documents, tiles = call.pattern, call.documents, call.tiles
    given = [p for p in (call.q_position, call.k_position) if p is not None]
    length = max([length, *(1 + int(p.max()) for p in given)])
    layout = tiles.layout().to(device) if tiles is not None else None
    k_position = call.k_position
    if k_position is not None and k_position.shape[1] > 1:  # one for each query head
        k_position = k_position.repeat_interleave(heads // k_position.shape[1], dim=1)
    head = torch.arange(heads)[None, :, None, None] if pattern.differs_by_head else 0

    def visible(rows: slice, columns: Tensor) -> Tensor:
        storage_i = torch.arange(rows.start, rows.stop, device=device)[None, None, :, None]
        storage_j = columns[None, :, None, :]
        i, j = storage_i, storage_j
        if documents is not None:
            own, others = documents[:, None, rows, None], documents[:, columns][:, :, None]
            i, j = storage_i - own, storage_j - others
        i = i if call.q_position is None else call.q_position[:, :, rows, None]
        j = j if k_position is None else k_position[:, :, columns[0]][:, :, None]
        exists = (i >= 0) & (j >= 0)
        seen = exists & pattern.visible(i.clamp(min=0), j.clamp(min=0), head, length=length)
        if documents is not None:
            seen = seen & (own == others)
        if tiles is not None:
            row = torch.arange(tiles.heads, device=device)[None, :, None, None]
            seen = seen & layout[row, storage_i // tiles.tile[0], storage_j // tiles.tile[1]]
        return seen

    return visible


@kept(maxsize=48)
def _pattern_chunks(
    pattern: Pattern, heads: int, num_queries: int, num_keys: int, chunk: int, device: str
) -> tuple[list[Tensor], list[Tensor] | None]:
    """For every chunk of queries the keys that it sees, and which cells those are.

    Returns:
        ``columns (heads | 1, K)`` of each chunk: heads that see fewer keys than others are filled
        up with keys that they do not see, and no key stands twice in a row; and ``visible
        (1, heads | 1, rows, K)`` of each, or None if that would be more than ``KEPT_CELLS``.
    """
    head = torch.arange(heads)[:, None, None] if pattern.differs_by_head else 0
    j = torch.arange(num_keys, device=device)[None, None, :]
    columns, visible, cells = [], [], 0
    for i in torch.arange(num_queries, device=device)[None, :, None].split(chunk, dim=1):
        seen = pattern.visible(
            i, j, head, length=max(num_queries, num_keys)
        )  # (heads | 1, rows, Lk)
        columns.append(_filled_up(seen.any(dim=1)))
        cells += columns[-1].numel() * i.numel()
        if cells <= KEPT_CELLS:
            visible.append(seen.take_along_dim(columns[-1][:, None], dim=2)[None])
        else:
            visible.clear()
    return columns, visible if cells <= KEPT_CELLS else None


def _filled_up(live: Tensor) -> Tensor:
    """Numbers of the true columns of ``live (heads, K)``, and others where a head has fewer."""
    most = max(int(live.sum(dim=1).max()), 1)
    return live.int().argsort(dim=1, descending=True, stable=True)[:, :most]


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
