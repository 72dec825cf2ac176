"""The fused kernels as operators of torch: `torch.compile` and autograd see one node each way.

``attend(q, k, v, *call.flatten())`` is differentiable. `custom_op` of torch would do the same
with six more Python frames in each call.
"""

import torch
from torch import Tensor, library

from kernels.attend import launch
from kernels.attend.call import SCHEMA

_FORWARD = f"attend(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)"
_BACKWARD = (
    "attend_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {SCHEMA}) -> (Tensor, Tensor, Tensor)"
)


class _Attend(torch.autograd.Function):
    """The forward operator with its gradient: what it runs under autograd."""

    @staticmethod
    def forward(ctx, q, k, v, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = attend(q, k, v, *arguments)
        tensors = [x if isinstance(x, Tensor) else None for x in arguments]
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.plain = [None if isinstance(x, Tensor) else x for x in arguments]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        arguments = [p if t is None else t for t, p in zip(tensors, ctx.plain, strict=True)]
        dout = torch.zeros_like(out) if dout is None else dout
        grads = attend_backward(dout, dlse, q, k, v, out, lse, *arguments)
        return *grads, *(None for _ in arguments)


def _differentiable(q, k, v, *arguments):
    """The forward operator under autograd; without a gradient to ask for, nothing is kept."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attend.apply(q, k, v, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return attend(q, k, v, *arguments)


def _fake_forward(q, k, v, text, scale, out_dtype, *rest):
    return launch.empty_output(q, v, out_dtype), launch.empty_lse(q)


def _fake_backward(dout, dlse, q, k, v, *rest):
    return tuple(map(launch.empty_gradient, (q, k, v)))


_library = library.Library("strider", "FRAGMENT")  # the operators live as long as this does
for _schema, _run, _fake in (
    (_FORWARD, launch.forward, _fake_forward),
    (_BACKWARD, launch.backward, _fake_backward),
):
    _name = _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    library.register_fake(f"strider::{_name}", _fake, lib=_library)
_library.impl("attend", _differentiable, "Autograd")

attend = torch.ops.strider.attend.default
attend_backward = torch.ops.strider.attend_backward.default
