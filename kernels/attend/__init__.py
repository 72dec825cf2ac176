"""Attention over the visible cells of a pattern: the one operation under every family."""

import math

import torch
from torch import Tensor

from kernels.attend import operator, sdpa, transforms
from kernels.attend.call import Call
from kernels.attend.work import ListedWork
from kernels.common.dispatch import Implementation, choose, is_transformed
from kernels.patterns import Pattern
from kernels.patterns.tiles import TileList

__all__ = ["Implementation", "attend", "merge"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LARGEST_HEAD = 256
TILE_SIDES = (16, 32, 64, 128)  # of tile lists that callers bring


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    documents: Tensor | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    tiles: TileList | None = None,
    out_dtype: torch.dtype | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys that ``pattern`` shows it.

    Args:
        q: queries ``(B, Hq, Lq, D)``, any strides.
        k: keys ``(B, Hkv, Lk, D)``; ``Hq`` is a multiple of ``Hkv``, and ``Hq // Hkv`` neighbouring
            query heads share one key head.
        v: values ``(B, Hkv, Lk, Dv)``.
        pattern: which keys are visible; evaluated per query head.
        scale: factor of the scores, default ``1 / sqrt(D)``.
        documents: ``(B, L)`` integers, with ``Lq == Lk == L``; neighbours with one number are of
            one document. Tokens of different documents do not see each other, and positions count
            from the start of each document.
        q_position: integers that broadcast to ``(B, Hq, Lq)``, default 0, 1, 2 ...: what the
            pattern is evaluated at. A token at a negative position sees nothing.
        k_position: integers that broadcast to ``(B, Hkv, Lk)``, default 0, 1, 2 ...; a token at a
            negative position is not seen.
        tiles: with positions, required: the tiles, in storage order, outside of which nothing is
            visible.
        out_dtype: dtype of ``out``, default that of ``q``. Partial results that will be merged
            should ask for float32.
        implementation: ``"reference"`` (plain PyTorch), ``"fused"`` (Triton), or ``"auto"``: fused
            on a GPU, or torch's kernel where the pattern hides nothing but the future; reference
            elsewhere.

    Returns:
        ``out (B, Hq, Lq, Dv)`` and ``lse (B, Hq, Lq)``, the natural logarithm of the sum of the
        exponentiated scores, float32 (float64 for float64 inputs). Both are differentiable. A
        query with no visible key gets ``out = 0``, ``lse = -inf`` and zero gradients.

    Raises:
        ValueError: if shapes, dtypes, devices, positions or the implementation do not fit.
        RuntimeError: if "fused" is differentiated twice, or in forward mode; "reference" can be.

    Source:
        Online softmax and the backward pass of FlashAttention-2, Dao 2023, arXiv:2307.08691;
        the gradient through ``lse`` joins there as ``dS = P (dP - (delta - dlse))``.
    """
    if not isinstance(pattern, Pattern):
        raise ValueError(
            f"pattern must be a Pattern, got {pattern!r}; `kernels.patterns.parse` reads text."
        )
    q, k, v = _autocast(q, k, v)
    _check_inputs(q, k, v)
    _check_positions(q, k, documents, q_position, k_position, tiles)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(
            f"scale must be positive and finite, got {scale}; change the sign of q instead."
        )
    if out_dtype is not None and out_dtype not in DTYPES:
        raise ValueError(f"out_dtype must be one of {DTYPES} or None, got {out_dtype!r}.")
    call = Call(
        pattern, scale, out_dtype or q.dtype, documents, q_position, k_position, tiles
    )  # fmt: skip
    transformed = is_transformed()
    if (
        implementation == "auto"
        and not transformed
        and (by_torch := sdpa.torch_call(q, k, v, call))
    ):
        return sdpa.attend(q, k, v, by_torch)
    run = operator.plain
    if choose(implementation, q.device, q.dtype) == "fused":
        _check_kernel_takes(q, v, tiles)
        run = operator.fused
        if tiles is not None and not transformed:
            call = call._replace(listed=ListedWork.of(tiles, q.device))
    if transformed:
        return transforms.attend(run, q, k, v, *call.flatten(q))
    return run.attend(q, k, v, *call.flatten(q))


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attention of the same queries over disjoint sets of keys, exactly.

    Args:
        parts: pairs ``(out (B, H, L, Dv), lse (B, H, L))`` as ``attend`` gives them.

    Returns:
        ``(out, lse)`` as one call over all the keys would give, ``out`` in the widest dtype of the
        parts; differentiable. Where no part has a visible key: ``out = 0`` and ``lse = -inf``.

    Source:
        The log-sum-exp identity, e.g. FlashAttention, Dao et al. 2022, arXiv:2205.14135, section 3.
    """
    lse = torch.stack([part_lse for _, part_lse in parts])
    nothing = torch.isneginf(lse)
    # A finite stand-in keeps the gradient of logsumexp finite where nothing is visible.
    lowest = torch.finfo(lse.dtype).min / 2
    total = torch.logsumexp(lse.masked_fill(nothing, lowest), dim=0)
    weight = torch.exp(lse.masked_fill(nothing, float("-inf")) - total)
    out = sum(out * w[..., None].to(out.dtype) for (out, _), w in zip(parts, weight, strict=True))
    return out, total.masked_fill(nothing.all(dim=0), float("-inf"))


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """What autocast makes of them: under it, one dtype.

    (An operator's ``register_autocast`` knows one dtype a device, not the one that is in force.)
    """
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k and v must be (B, H, L, D), got {shapes}.")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"batch, key heads, key length and D must agree, got {shapes}.")
    if max(q.shape[2], k.shape[2]) >= 2**31:
        raise ValueError(f"a sequence must have fewer than 2**31 tokens, got {shapes}.")
    if min(q.shape) < 1 or min(k.shape) < 1 or min(v.shape) < 1:
        raise ValueError(f"no dimension may be empty, got {shapes}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}."
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k and v must share one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}; "
            f"cast them before the call."
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}."
        )


def _check_kernel_takes(q: Tensor, v: Tensor, tiles: TileList | None) -> None:
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        raise ValueError(
            f"the fused kernel takes heads of up to {LARGEST_HEAD}, got D={q.shape[3]} and "
            f"Dv={v.shape[3]}; use implementation='reference'."
        )
    if tiles is not None and not set(tiles.tile) <= set(TILE_SIDES):
        raise ValueError(
            f"the fused kernel takes tiles with sides of {TILE_SIDES} tokens, got {tiles.tile}; "
            f"list such tiles, or use implementation='reference'."
        )


def _check_positions(q, k, documents, q_position, k_position, tiles) -> None:
    integers = {"documents": documents, "q_position": q_position, "k_position": k_position}
    for name, x in integers.items():
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of integers, got {what}.")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}.")
    if tiles is not None and not isinstance(tiles, TileList):
        raise ValueError(f"tiles must be a TileList, got {type(tiles).__name__}.")
    B, heads, num_queries = q.shape[:3]
    num_keys = k.shape[2]
    if documents is not None and (documents.shape != (B, num_queries) or num_queries != num_keys):
        raise ValueError(
            f"documents must be (B, L) with as many queries as keys, "
            f"got {tuple(documents.shape)} for B={B}, {num_queries} queries and {num_keys} keys."
        )
    for name, position, shape in (
        ("q_position", q_position, (B, heads, num_queries)),
        ("k_position", k_position, (B, k.shape[1], num_keys)),
    ):
        if position is None:
            continue
        if position.dim() != 3 or any(
            n not in (1, m) for n, m in zip(position.shape, shape, strict=True)
        ):
            raise ValueError(f"{name} must broadcast to {shape}, got {tuple(position.shape)}.")
        if tiles is None:
            raise ValueError(f"{name} needs `tiles` over the storage order, got tiles=None.")
    if tiles is not None:
        lengths = num_queries, num_keys
        needed = tuple(-(-n // t) for n, t in zip(lengths, tiles.tile, strict=True))
        if tiles.shape != needed or tiles.heads not in (1, heads):
            raise ValueError(
                f"tiles of {tiles.tile} over {num_queries} queries and {num_keys} keys must number "
                f"{needed} for 1 or {heads} heads, got {tiles.shape} for {tiles.heads}."
            )
