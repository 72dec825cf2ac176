"""When attention runs on torch's own kernel, which is faster where only the future is hidden.

Only under ``implementation="auto"``, which `attend` asks. `models/attention/dense.py` calls torch
itself, on a CPU as well.
"""

import functools

import torch
from torch import Tensor

from kernels.attend import operator
from kernels.attend.call import Call
from kernels.patterns import causal, full
from kernels.patterns.algebra import Pattern

CUDNN_LARGEST_HEAD = 128


def torch_call(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Call | None:
    """The call with ``causal()`` or ``full()`` for its pattern, if torch's kernel computes it."""
    if call.documents is not None or call.tiles is not None:
        return None
    same = equal_pattern(call.pattern, q.shape[2])
    if same is None or not can_run(q, k, v, call.out_dtype):
        return None
    return call._replace(pattern=same)


def equal_pattern(pattern: Pattern, length: int) -> Pattern | None:
    """``causal()`` or ``full()`` if the pattern surely equals it over ``length`` tokens."""
    if length > pattern.past_seen_up_to:
        return None
    if pattern.is_causal:
        return causal()
    return full() if length <= pattern.future_seen_up_to else None


def can_run(q: Tensor, k: Tensor, v: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether torch's kernels take these inputs as they are."""
    size = q.shape[3]
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and out_dtype == q.dtype
        and q.shape == k.shape == v.shape
        and size % 8 == 0
        and size <= CUDNN_LARGEST_HEAD
    )


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, both differentiable: torch's kernels give no gradient of the lse.

    The pattern of the call is ``causal()`` or ``full()``.
    """
    is_causal = call.pattern == causal()
    if _has_cudnn(q.device):
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, is_causal, False, scale=call.scale
        )
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, is_causal, False, scale=call.scale
        )
    out, lse = found[0], found[1].detach().reshape(q.shape[:3])
    return out, _LogSumExp.apply(q, k, v, out.detach(), lse, *call.flatten(q))


class _LogSumExp(torch.autograd.Function):
    """The lse as it is, and its gradient by the fused kernels, if anything asks for it."""

    @staticmethod
    def forward(ctx, q, k, v, out, lse, *arguments):
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = arguments  # none of them is a tensor of the model
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        nothing = torch.zeros_like(out)
        grads = operator.gradients(
            operator.fused, nothing, dlse, q, k, v, out, lse, *ctx.arguments
        )  # fmt: skip
        return *grads, None, None, *(None for _ in ctx.arguments)


@functools.cache
def _has_cudnn(device: torch.device) -> bool:
    """Hopper and later, where cuDNN is the fastest."""
    # Fake tensors may be on a card that is not there.
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)
