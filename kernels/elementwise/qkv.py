"""Queries, keys and values by head, from one product: QK-norm and rotary positions on the way.

Compiled by torch, the backward pass of this alone took 5 of the 62 ms of a training step, three
times what its bytes need (bench/results, 2026-11-24). Here each direction is one kernel that reads
and writes every number once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from kernels.common.dispatch import Implementation, choose, untransformed
from kernels.common.jit import kernel

EPSILON = 1e-6  # added to the mean square
TOKENS = 16  # of a program

Rotary = tuple[Tensor, Tensor]


def split_heads(
    qkv: Tensor,
    heads: int,
    qk_dim: int,
    *,
    gains: tuple[Tensor, Tensor] | None = None,
    rotary: Rotary | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of each head; queries and keys normalised, then turned.

    Args:
        qkv: ``(B, L, 2 qk_dim + dim)``: all queries, all keys, all values of a token.
        heads: number of heads ``H``.
        qk_dim: width of all queries together, a multiple of ``H``, with pairs to turn.
        gains: of the RMS norm of queries and of keys, each ``(qk_dim / H,)``; None: no norm.
        rotary: cosines and sines ``(L, qk_dim / H / 2)`` of the angles by which the pairs
            ``(x[d], x[d + D / 2])`` are turned; None: no positions.
        implementation: see ``kernels.common.dispatch``.

    Returns:
        ``q, k (B, H, L, qk_dim / H)`` and ``v (B, H, L, dim / H)``, in ``(B, L, H, D)`` memory.

    Raises:
        ValueError: if a head has no whole pairs, or the implementation cannot run: "fused" not
            under a transform of `torch.func`, where "auto" is the reference.

    Source:
        RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; QK-norm, Henry et al. 2020,
        arXiv:2010.04245; RoFormer, Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    if qk_dim % (2 * heads):
        raise ValueError(
            f"qk_dim must be a multiple of 2 x heads, got qk_dim={qk_dim} and heads={heads}."
        )
    chosen = choose(untransformed(implementation), qkv.device, qkv.dtype)
    if chosen == "reference" or (gains is None and rotary is None):
        return _reference(qkv, heads, qk_dim, gains, rotary)
    q, k, v = torch.ops.strider.split_heads(
        qkv, *(gains or (None, None)), *(rotary or (None, None)), heads, qk_dim
    )
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _reference(qkv: Tensor, heads: int, qk_dim: int, gains, rotary: Rotary | None):
    dim = qkv.shape[-1] - 2 * qk_dim
    q, k, v = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2)
        for x in qkv.split((qk_dim, qk_dim, dim), dim=-1)
    )
    q, k = (
        _normed_and_turned(x, gain, rotary)
        for x, gain in zip((q, k), gains or (None, None), strict=True)
    )
    return q, k, v


def _normed_and_turned(x: Tensor, gain: Tensor | None, rotary: Rotary | None) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if gain is not None:
        wide = wide * (wide.square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt() * gain
    if rotary is not None:
        cos, sin = rotary
        first, second = wide.chunk(2, dim=-1)
        wide = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return wide.to(x.dtype)


# ------------------------------------------------------------------------------ operator


@library.custom_op(
    "strider::split_heads", mutates_args=(),
    schema="(Tensor qkv, Tensor? q_gain, Tensor? k_gain, Tensor? cos, Tensor? sin, int heads, "
    "int qk_dim) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def _forward(qkv, q_gain, k_gain, cos, sin, heads, qk_dim):
    q, k, v = _empty(qkv, heads, qk_dim)
    B, L, width = qkv.shape
    split_kernel[(triton.cdiv(B * L, TOKENS),)](
        qkv.contiguous(), q, k, v, q_gain, k_gain, cos, sin, B * L, L,
        **_sizes(heads, qk_dim, width), num_warps=4,
    )  # fmt: skip
    return q, k, v


@_forward.register_fake
def _(qkv, q_gain, k_gain, cos, sin, heads, qk_dim):
    return _empty(qkv, heads, qk_dim)


@library.custom_op(
    "strider::split_heads_backward", mutates_args=(),
    schema="(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor? q_gain, Tensor? k_gain, "
    "Tensor? cos, Tensor? sin, int heads, int qk_dim) -> (Tensor, Tensor)",
)  # fmt: skip
def _backward(dq, dk, dv, qkv, q_gain, k_gain, cos, sin, heads, qk_dim):
    B, L, width = qkv.shape
    dqkv, programs = qkv.new_empty(qkv.shape), triton.cdiv(B * L, TOKENS)
    parts = _gain_gradients(qkv, heads, qk_dim, programs)
    split_backward_kernel[(programs,)](
        dq.contiguous(), dk.contiguous(), dv.contiguous(), qkv.contiguous(), dqkv, parts,
        q_gain, k_gain, cos, sin, B * L, L, **_sizes(heads, qk_dim, width), num_warps=4,
    )  # fmt: skip
    return dqkv, parts.sum(dim=0)


@_backward.register_fake
def _(dq, dk, dv, qkv, q_gain, k_gain, cos, sin, heads, qk_dim):
    return qkv.new_empty(qkv.shape), _gain_gradients(qkv, heads, qk_dim, 1)[0]


def _keep(ctx, inputs, output):
    *tensors, heads, qk_dim = inputs
    ctx.save_for_backward(*tensors)
    ctx.sizes = heads, qk_dim


def _gradients(ctx, dq, dk, dv):
    tensors = ctx.saved_tensors  # asked for once: recomputation allows no more
    dqkv, dgains = torch.ops.strider.split_heads_backward(dq, dk, dv, *tensors, *ctx.sizes)
    q_gain = tensors[1]
    dgains = (None, None) if q_gain is None else dgains.to(q_gain.dtype).unbind()
    return dqkv, *dgains, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _empty(qkv: Tensor, heads: int, qk_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    B, L, width = qkv.shape
    sizes = qk_dim, qk_dim, width - 2 * qk_dim
    q, k, v = (qkv.new_empty((B, L, heads, size // heads)) for size in sizes)
    return q, k, v


def _gain_gradients(qkv: Tensor, heads: int, qk_dim: int, programs: int) -> Tensor:
    return qkv.new_empty((programs, 2, qk_dim // heads), dtype=torch.float32)


def _sizes(heads: int, qk_dim: int, width: int) -> dict[str, int]:
    D, DV = qk_dim // heads, (width - 2 * qk_dim) // heads
    return {
        "HEADS": heads,
        "D": D,
        "DV": DV,
        "HALF": max(1, triton.next_power_of_2((D + 1) // 2)),
        "BLOCK_DV": triton.next_power_of_2(DV),
        "BLOCK": TOKENS,
        "EPS": EPSILON,
    }


# ------------------------------------------------------------------------------ kernels


@triton.jit
def _load(base, token, tokens, stride, first, d, end):
    """Columns ``first + d`` of rows ``token``, float32; 0 beyond the last token and column."""
    address = base + token[:, None].to(tl.int64) * stride + (first + d)[None, :]
    inside = (token < tokens)[:, None] & (first + d < end)[None, :]
    return tl.load(address, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(base, x, token, tokens, stride, first, d, end):
    address = base + token[:, None].to(tl.int64) * stride + (first + d)[None, :]
    inside = (token < tokens)[:, None] & (first + d < end)[None, :]
    tl.store(address, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _angles(cos_ptr, sin_ptr, token, tokens, length, d, D: tl.constexpr):
    """Cosines and sines of a block of tokens."""
    half: tl.constexpr = D // 2
    cos = _load(cos_ptr, token % length, tokens, half, 0, d, half)
    sin = _load(sin_ptr, token % length, tokens, half, 0, d, half)
    return cos, sin


@triton.jit
def _gain(ptr, d, D: tl.constexpr):
    """The two halves of a gain, as rows."""
    half: tl.constexpr = D // 2
    first = tl.load(ptr + d, mask=d < half, other=0.0).to(tl.float32)
    second = tl.load(ptr + half + d, mask=d < half, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def _copy_values(
    source, first, width, target, target_first, target_width, token, tokens, dv,
    HEADS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The values of all heads, between two matrices in which they begin at different columns."""
    for head in range(HEADS):
        start, end = first + head * DV, target_first + head * DV
        v = _load(source, token, tokens, width, start, dv, start + DV)
        _store(target, v, token, tokens, target_width, end, dv, end + DV)


@kernel
def split_kernel(
    qkv, q_ptr, k_ptr, v_ptr, q_gain, k_gain, cos_ptr, sin_ptr, tokens, length,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """All heads of a block of tokens."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d, dv = tl.arange(0, HALF), tl.arange(0, BLOCK_DV)
    width: tl.constexpr = HEADS * (2 * D + DV)
    half: tl.constexpr = D // 2
    if cos_ptr is not None:
        cos, sin = _angles(cos_ptr, sin_ptr, token, tokens, length, d, D)
    for part in tl.static_range(2):
        out = q_ptr if part == 0 else k_ptr
        gain = q_gain if part == 0 else k_gain
        if gain is not None:
            first_gain, second_gain = _gain(gain, d, D)
        for head in range(HEADS):
            start = (part * HEADS + head) * D
            x = _load(qkv, token, tokens, width, start, d, start + half)
            y = _load(qkv, token, tokens, width, start + half, d, start + D)
            if gain is not None:
                scale = tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / D + EPS)
                x = x * scale[:, None] * first_gain
                y = y * scale[:, None] * second_gain
            if cos_ptr is not None:
                x, y = x * cos - y * sin, x * sin + y * cos
            start = head * D
            _store(out, x, token, tokens, HEADS * D, start, d, start + half)
            _store(out, y, token, tokens, HEADS * D, start + half, d, start + D)
    _copy_values(
        qkv, 2 * HEADS * D, width, v_ptr, 0, HEADS * DV, token, tokens, dv, HEADS, DV
    )  # fmt: skip


@kernel
def split_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv, dqkv, dgain, q_gain, k_gain, cos_ptr, sin_ptr, tokens, length,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """All heads of a block of tokens, and its share of the gradients of the gains.

    With ``n = x r`` the normalised query, ``r = rsqrt(mean x^2)``: ``dn = gain * dy`` and
    ``dx = r (dn - n mean(n dn))``.
    """
    program = tl.program_id(0)
    token = program * BLOCK + tl.arange(0, BLOCK)
    d, dv = tl.arange(0, HALF), tl.arange(0, BLOCK_DV)
    width: tl.constexpr = HEADS * (2 * D + DV)
    half: tl.constexpr = D // 2
    if cos_ptr is not None:
        cos, sin = _angles(cos_ptr, sin_ptr, token, tokens, length, d, D)
    for part in tl.static_range(2):
        dout = dq_ptr if part == 0 else dk_ptr
        gain = q_gain if part == 0 else k_gain
        dfirst = tl.zeros((HALF,), tl.float32)
        dsecond = tl.zeros((HALF,), tl.float32)
        if gain is not None:
            first_gain, second_gain = _gain(gain, d, D)
        for head in range(HEADS):
            start = head * D
            dx = _load(dout, token, tokens, HEADS * D, start, d, start + half)
            dy = _load(dout, token, tokens, HEADS * D, start + half, d, start + D)
            if cos_ptr is not None:
                dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
            start = (part * HEADS + head) * D
            if gain is not None:
                x = _load(qkv, token, tokens, width, start, d, start + half)
                y = _load(qkv, token, tokens, width, start + half, d, start + D)
                scale = tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / D + EPS)
                x, y = x * scale[:, None], y * scale[:, None]
                dfirst += tl.sum(dx * x, axis=0)
                dsecond += tl.sum(dy * y, axis=0)
                dx, dy = dx * first_gain, dy * second_gain
                mean = (tl.sum(x * dx, axis=1) + tl.sum(y * dy, axis=1)) / D
                dx = scale[:, None] * (dx - x * mean[:, None])
                dy = scale[:, None] * (dy - y * mean[:, None])
            _store(dqkv, dx, token, tokens, width, start, d, start + half)
            _store(dqkv, dy, token, tokens, width, start + half, d, start + D)
        if gain is not None:
            place = dgain + (program * 2 + part) * D + d
            tl.store(place, dfirst, mask=d < half)
            tl.store(place + half, dsecond, mask=d < half)
    _copy_values(
        dv_ptr, 0, HEADS * DV, dqkv, 2 * HEADS * D, width, token, tokens, dv, HEADS, DV
    )  # fmt: skip
