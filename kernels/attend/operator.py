"""The fused kernels as operators of torch: `torch.compile` and autograd see one node each way.

An operator takes tensors and numbers, so the pattern travels as its encoded text, and a tile list
as its tensors. A plan is found again by the text.
"""

import functools

import torch
from torch import library

from kernels.attend import launch
from kernels.patterns import Pattern, parse
from kernels.patterns.tiles import TileList

# The arguments behind q, k and v that both directions share.
_REST = (
    "Tensor pattern, float scale, Tensor? documents, Tensor? q_position, Tensor? k_position, "
    "Tensor? tile_offsets, Tensor? tile_keys, Tensor? tile_full, int[] tile_sizes"
)


def attend(q, k, v, pattern: Pattern, scale, documents, q_position, k_position, tiles, out_dtype):
    """``(out, lse)`` of checked arguments, differentiable: see ``kernels.attend.attend``."""
    listed = (None, None, None, [])
    if tiles is not None:
        listed = (tiles.offsets, tiles.keys, tiles.full, [*tiles.shape, *tiles.tile])
    rest = (pattern.encoded, scale, documents, q_position, k_position, *listed)
    return torch.ops.strider.attend(q, k, v, *rest, out_dtype)


@functools.lru_cache(maxsize=1024)
def _decoded(text: bytes) -> Pattern:
    return parse(text.decode())


def _call(pattern, scale, documents, q_position, k_position, offsets, keys, full, sizes):
    tiles = None
    if offsets is not None:
        tiles = TileList(offsets, keys, full, tuple(sizes[:2]), tuple(sizes[2:]))
    documents = documents if documents is None else documents.contiguous()
    pattern = _decoded(pattern.numpy().tobytes())
    return launch.Call(pattern, scale, documents, q_position, k_position, tiles)


@library.custom_op(
    "strider::attend", mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_REST}, ScalarType out_dtype) -> (Tensor, Tensor)",
)  # fmt: skip
def _forward(q, k, v, *rest):
    return launch.forward(q, k, v, _call(*rest[:-1]), rest[-1])


@_forward.register_fake
def _(q, k, v, *rest):
    out = launch.empty_output(q, v, rest[-1])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@library.custom_op(
    "strider::attend_backward", mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_REST}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def _backward(dout, dlse, q, k, v, out, lse, *rest):
    dlse = dlse if dlse is None else dlse.contiguous()
    return launch.backward(dout, dlse, q, k, v, out, lse, _call(*rest))


@_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, *rest):
    return tuple(map(launch.empty_gradient, (q, k, v)))


def _keep(ctx, inputs, output):
    q, k, v, pattern, scale, *tensors, sizes, _ = inputs
    ctx.save_for_backward(q, k, v, *output, pattern, *tensors)
    ctx.plain = scale, sizes
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse):
    q, k, v, out, lse, pattern, *tensors = ctx.saved_tensors
    scale, sizes = ctx.plain
    dout = torch.zeros_like(out) if dout is None else dout
    rest = (pattern, scale, *tensors, sizes)
    grads = torch.ops.strider.attend_backward(dout, dlse, q, k, v, out, lse, *rest)
    return (*grads, *(None for _ in range(10)))


_forward.register_autograd(_gradients, setup_context=_keep)
