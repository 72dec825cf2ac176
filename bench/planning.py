"""What it costs to plan a pattern: our work lists, and the block mask of FlexAttention."""

import torch

from bench.patterns import HEADS, TOKENS, Case
from bench.peers import block_mask
from bench.timing import inputs, wall_milliseconds
from kernels.attend import passes, setup, work
from kernels.attend.call import Call
from kernels.attend.tuning import DIRECTIONS
from kernels.patterns.algebra import Pattern
from kernels.patterns.terms import blocks, random_blocks


def planning_times(case: Case, length: int, device: torch.device) -> dict:
    """Milliseconds by the host's clock, and GiB at the peak, for one pattern and length.

    Ours plans all directions and heads, each with blocks of its own; a block mask serves all heads.
    """
    q, k, v, _ = inputs(length, HEADS, case.head_size, TOKENS, device)
    call = Call(case.pattern, case.head_size**-0.5, q.dtype)

    def ours() -> None:
        for chain in setup.chains_of(case.pattern, HEADS, length, length, False):
            for part in chain:
                for direction in DIRECTIONS:
                    setup.setup_of(part, direction, q, k, v, call)

    row = {"pattern": case.name, "length": length}
    ours()  # so that nothing is imported or compiled inside the clock
    _forget_plans()
    row["ours_ms"], row["ours_gib"] = _cost(ours)
    row["ours_cached_ms"], _ = _cost(ours)
    if not case.is_dense:
        row |= _of_block_mask(case, length, device)
    return row


def _of_block_mask(case: Case, length: int, device: torch.device) -> dict:
    row: dict = {}
    try:
        block_mask(case, 256, device)
        row["mask_eager_ms"], row["mask_eager_gib"] = _cost(
            lambda: block_mask(case, length, device)
        )
    except torch.OutOfMemoryError:
        row["mask_eager_ms"] = "out of memory"
    torch.cuda.empty_cache()
    torch._dynamo.reset()

    def compiled():
        return block_mask(case, length, device, compiled=True)

    try:
        row["mask_compiled_first_ms"], _ = _cost(compiled)
        row["mask_compiled_ms"], row["mask_compiled_gib"] = _cost(compiled)
    except Exception as error:  # of the peer's compiler
        row["mask_compiled_ms"] = f"{type(error).__name__}"
    return row


def _cost(run) -> tuple[float, float]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    milliseconds = wall_milliseconds(run)
    return milliseconds, (torch.cuda.max_memory_allocated() - before) / 2**30


def _forget_plans() -> None:
    """Empty what is kept of patterns and lists; compiled kernels stay."""
    Pattern.bound.cache_clear()
    for module in (setup, passes, work, blocks, random_blocks):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
