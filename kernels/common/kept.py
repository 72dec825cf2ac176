"""Results that are kept from call to call, whatever mode the call that makes them is in."""

import functools
from collections.abc import Callable

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes


def kept(maxsize: int) -> Callable[[Callable], Callable]:
    """``functools.lru_cache`` for functions whose results hold tensors.

    They are made outside of inference mode, of fake tensors, of a default device and of
    `torch.func`: a later call finds plain tensors, which it can train with.
    """

    def keep(function: Callable) -> Callable:
        @functools.lru_cache(maxsize)
        @functools.wraps(function)
        def make(*arguments, **keywords):
            with (
                torch.inference_mode(False),
                torch._C.DisableTorchFunction(),
                _disable_current_modes(),
                temporarily_clear_interpreter_stack(),
            ):
                return function(*arguments, **keywords)

        return make

    return keep
