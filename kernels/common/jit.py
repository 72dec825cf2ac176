"""Compiling kernels: which arguments may decide what is compiled.

Names inside kernels: ``q, k, v, out`` are tiles in registers or the arguments that they are loaded
from, ``*_ptr`` addresses in memory; ``i`` indexes query tokens and ``j`` key tokens. Token and
batch numbers become 64-bit before they meet a stride: a tensor of more than 2**31 elements must not
wrap around.
"""

import inspect

import triton

# Integers whose value must not decide what is compiled: a new length or pattern compiles nothing.
# (Strides stay: that a row is contiguous and aligned makes its loads wide. So do the integers of a
# named tuple, whatever is said here: a count must be an argument of its own.)
_COUNTS = [
    "kv_group", "table_stride", "heads", "launch_heads", "work", "parts", "rows", "num_queries",
    "num_keys", "q_step", "q_first", "k_run", "k_step", "k_first", "tokens", "length", "run",
    "step", "first", "bits", "least", "most", "long_room", "short_room", "cut_room", "room",
]  # fmt: skip


def kernel(function):
    """``triton.jit`` for a kernel that is launched, compiled once for all of its counts."""
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in _COUNTS if name in names])
