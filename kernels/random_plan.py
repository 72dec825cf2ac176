"""The draw behind ``random_blocks``: uniform, without replacement, a pure function of integers.

Every rank, a resumed run and the backward pass draw the same blocks, because nothing but the
arguments enters: no generator, no state.
"""

import torch
from torch import Tensor


def draw_blocks(candidates: Tensor, count: int, heads: int, key: tuple[int, ...]) -> Tensor:
    """Draw up to ``count`` key blocks for every head and query block.

    Draw number ``n`` of a row takes the ``(hash mod left)``-th of the ``left`` candidates that the
    draws before it have left over, counted from block 0.

    Args:
        candidates: which key blocks may be drawn, ``(query blocks, key blocks)`` bool.
        count: blocks to draw for each query block.
        heads: number of heads, each with draws of its own.
        key: integers that select the plan (seed, layer, ...).

    Returns:
        Drawn key blocks, ``(heads, query blocks, count)`` int64, -1 where candidates ran out.
    """
    rows, columns = candidates.shape
    head, row = torch.arange(heads)[:, None], torch.arange(rows)[None, :]
    left_over = candidates.expand(heads, rows, columns).clone()
    drawn = torch.full((heads, rows, count), -1)
    for n in range(count):
        left = left_over.sum(dim=2)  # (heads, rows)
        rank = hash_integers(*key, head, row, n) % left.clamp(min=1)
        # The candidate of that rank is where the running count first exceeds it.
        block = (left_over.cumsum(dim=2) <= rank[:, :, None]).sum(dim=2)
        found = left > 0
        drawn[:, :, n] = torch.where(found, block, -1)
        left_over.scatter_(2, block.clamp(max=columns - 1)[:, :, None], False)
    return drawn


def hash_integers(*parts: int | Tensor) -> Tensor:
    """Mix integers (or broadcasting int64 tensors) into uniform numbers in ``[0, 2**63)``.

    Chained finaliser of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators"); int64 arithmetic wraps, as the algorithm wants.
    """
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        state = state + torch.as_tensor(part) + _signed(0x9E3779B97F4A7C15)
        state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
        state = state ^ _shift_right(state, 31)
    return state & (2**63 - 1)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift without copying the sign bit in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """A 64-bit constant as the int64 with the same bits."""
    return constant - 2**64 if constant >= 2**63 else constant
