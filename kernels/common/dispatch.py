"""Which implementation runs: the one that was asked for, or under "auto" the fastest that is right.

An explicit request is never swapped, and no choice changes which keys are visible.
"""

from typing import Literal, get_args

import torch
from torch.autograd import forward_ad

from kernels.common.interpreter import INTERPRETED

Implementation = Literal["auto", "reference", "fused"]


def choose(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "reference" or "fused".

    Raises:
        ValueError: if there is no such implementation, or it cannot run on this device and dtype.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)}, got {implementation!r}."
        )
    if implementation == "auto":
        fused = device.type == "cuda" and dtype != torch.float64
        return "fused" if fused else "reference"
    if implementation == "fused" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"implementation='fused' needs a GPU, got tensors on {device}; use 'auto' or "
            f"'reference' there, or set TRITON_INTERPRET=1 before Python starts to test the kernel."
        )
    if implementation == "fused" and dtype == torch.float64:
        raise ValueError(
            "implementation='fused' computes in bfloat16, float16 or float32, got torch.float64; "
            "use 'reference'."
        )
    return implementation


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work, or the forward mode of autograd."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def untransformed(implementation: str) -> str:
    """What to choose where a kernel does not know these: "reference" in place of "auto".

    Raises:
        ValueError: if "fused" was asked for.
    """
    if not is_transformed():
        return implementation
    if implementation == "fused":
        raise ValueError(
            "implementation='fused' has no rule here for the transforms of torch.func, nor for "
            "forward mode; use 'auto' or 'reference'."
        )
    return "reference" if implementation == "auto" else implementation
