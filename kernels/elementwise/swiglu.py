"""SwiGLU between its linear maps, ``silu(gate) * up``, whose backward pass is one kernel.

Compiled by torch, the backward pass of this alone took 4.4 ms of a training step, its bytes need
2.6 (bench/results, 2026-11-24). Here one kernel reads and writes every number once. The forward
pass stays plain torch, which fuses it well.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from kernels.common.dispatch import Implementation, choose, untransformed
from kernels.common.jit import kernel

BLOCK = 1024  # numbers of dy that a program serves
WARPS = 4  # of a program: 8 numbers a thread, 16 bytes of bfloat16


def swiglu(x: Tensor, implementation: Implementation = "auto") -> Tensor:
    """``silu(gate) * up``, where ``silu(gate) = gate sigmoid(gate)``.

    Args:
        x: gate and up side by side, ``(..., 2 H)``.
        implementation: see ``kernels.common.dispatch``; it decides how the gradient is computed.

    Returns:
        ``(..., H)``, in the dtype of ``x``.

    Raises:
        ValueError: if ``x`` has no two halves, or the implementation cannot run: "fused" not under
            a transform of `torch.func`, where "auto" is the reference.
        RuntimeError: if the gradient of "fused" is differentiated in its turn.

    Source:
        Shazeer 2020, arXiv:2002.05202, without biases.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x must be gate and up side by side, got a width of {x.shape[-1]}.")
    if choose(untransformed(implementation), x.device, x.dtype) == "reference":
        return _product(x)
    return _SwiGLU.apply(x)


def _product(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Not an operator, which would hide the forward pass from the compiler.

    Nor marked as differentiable once: that lets a gradient whose ``dy`` is constant pass for one
    that does not depend on ``x``, where an operator without a formula raises.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _product(x)

    @staticmethod
    def backward(ctx, dy):
        return torch.ops.strider.swiglu_backward(dy, *ctx.saved_tensors)


@library.custom_op(
    "strider::swiglu_backward", mutates_args=(), schema="(Tensor dy, Tensor x) -> Tensor"
)
def _backward(dy, x):
    dx, H = x.new_empty(x.shape), dy.shape[-1]
    swiglu_backward_kernel[(triton.cdiv(dy.numel(), BLOCK),)](
        dy.contiguous(), x.contiguous(), dx, x.shape[:-1].numel(),
        H=H, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return dx


@_backward.register_fake
def _(dy, x):
    return x.new_empty(x.shape)


@kernel
def swiglu_backward_kernel(dy_ptr, x_ptr, dx_ptr, rows, H: tl.constexpr, BLOCK: tl.constexpr):
    """A run of ``dy``, which may begin and end inside rows: no thread waits for short ones.

    With ``s = sigmoid(gate)``: ``dgate = dy up s (1 + gate (1 - s))`` and ``dup = dy gate s``.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = n // H
    inside = row < rows
    first = n + row * H  # of dy (rows, H) and of the first half of x (rows, 2 H)
    dy = tl.load(dy_ptr + n, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + first + H, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dy * up * s * (1 + gate * (1 - s))
    dup = dy * gate * s
    tl.store(dx_ptr + first, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + first + H, dup.to(dx_ptr.dtype.element_ty), mask=inside)
