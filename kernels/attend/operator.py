"""The implementations as operators of torch: `torch.compile` and autograd see one node each way.

``fused.attend(q, k, v, *call.flatten())`` is differentiable, once; `transforms.py` is for all else.
`custom_op` of torch would do the same with six more Python frames in each call.
"""

import functools

import torch
from torch import Tensor, library

from kernels.attend import launch, reference, transforms
from kernels.attend.call import NUMBERS, SCHEMA, with_work
from kernels.attend.transforms import Operators

_FORWARD = f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {SCHEMA}) -> (Tensor, Tensor, Tensor)"
)


class _Attend(torch.autograd.Function):
    """The forward operator with its gradient: what it runs under autograd."""

    @staticmethod
    def forward(ctx, operators: Operators, q, k, v, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = operators.attend(q, k, v, *arguments)
        ctx.save_for_backward(q, k, v, out, lse, *arguments[NUMBERS:])
        ctx.operators, ctx.numbers = operators, arguments[:NUMBERS]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        arguments = (*ctx.numbers, *tensors)
        dout = torch.zeros_like(out) if dout is None else dout
        grads = gradients(ctx.operators, dout, dlse, q, k, v, out, lse, *arguments)
        return None, *grads, *(None for _ in arguments)


def gradients(operators: Operators, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, in a node of their own where the backward pass is recorded or mapped."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return transforms.gradients(operators, *arguments)
    return operators.gradients(*arguments)


def _differentiable(operators: Operators, q, k, v, *arguments):
    """The forward operator under autograd; without a gradient to ask for, nothing is kept."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attend.apply(operators, q, k, v, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operators.attend(q, k, v, *arguments)


def _fake_forward(q, k, v, scale, out_dtype, *rest):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return launch.empty_output(q, v, out_dtype), lse


def _fake_backward(dout, dlse, q, k, v, *rest):
    return tuple(map(launch.empty_gradient, (q, k, v)))


_library = library.Library("strider", "FRAGMENT")  # the operators live as long as this does


def _define(name: str, schema: str, run, fake):
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    library.register_fake(f"strider::{name}", fake, lib=_library)
    return getattr(torch.ops.strider, name).default


def _implementation(name: str, forward, backward, formula, prepare) -> Operators:
    made = Operators(
        _define(name, _FORWARD, forward, _fake_forward),
        _define(f"{name}_backward", _BACKWARD, backward, _fake_backward),
        formula,
        prepare,
    )
    _library.impl(name, functools.partial(_differentiable, made), "Autograd")
    return made


fused = _implementation("attend", launch.forward, launch.backward, None, with_work)
plain = _implementation(
    "attend_reference", reference.forward, reference.backward, reference.formula,
    lambda arguments, device: arguments,
)  # fmt: skip
