"""Drawing blocks of keys: uniform, without replacement, and a function of integers alone.

Which blocks may be drawn, and by which integers, `terms/random_blocks.py` says.
"""

import torch
from torch import Tensor

from kernels.patterns.runs import Runs


def draw_blocks(
    candidates: Runs, rows: int, count: int, heads: tuple[int, ...], key: tuple[int, ...]
) -> Tensor:
    """Draw up to ``count`` key blocks for every head and query block.

    Draw number ``n`` of a row takes the ``(hash mod left)``-th of the ``left`` candidates that the
    draws before it have left over, counted from block 0.

    Args:
        candidates: which key blocks may be drawn for each query block, ascending.
        rows: query blocks.
        count: blocks to draw for each query block.
        heads: numbers of the heads, each with draws of its own.
        key: integers that select the draw (seed, layer, ...).

    Returns:
        Drawn key blocks, ``(heads, query blocks, count)`` int64, -1 where candidates ran out.
    """
    device = candidates.row.device
    last = candidates.width.cumsum(0)  # candidates up to the end of each run, over all rows
    rows = torch.arange(rows + 1, device=device)
    run = torch.searchsorted(candidates.row, rows)
    before = torch.cat([last.new_zeros(1), last])[run]  # ... before each row, and in all
    head = torch.tensor(heads, device=device)[:, None]
    rank = _draw_ranks(before.diff(), count, key, head, rows[None, :-1])
    place = before[:-1, None] + rank  # among the candidates of all rows
    run = torch.searchsorted(last, place, right=True).clamp(max=max(len(last) - 1, 0))
    if not len(last):
        return torch.full_like(rank, -1)
    block = candidates.first[run] + place - (last - candidates.width)[run]
    return torch.where(rank >= 0, block, -1)


def _draw_ranks(candidates: Tensor, count: int, key: tuple[int, ...], head, row) -> Tensor:
    """Which of each row's candidates are drawn, ``(heads, rows, count)``, -1 for none."""
    drawn, ranks = [], torch.empty(*torch.broadcast_shapes(head.shape, row.shape), 0).long()
    ranks = ranks.to(row.device)  # of earlier draws, ascending
    for n in range(count):
        left = candidates - n
        rank = hash_integers(*key, head, row, n) % left.clamp(min=1)
        for earlier in ranks.unbind(dim=2):  # step over what is gone
            rank = rank + (rank >= earlier)
        ranks = torch.cat([ranks, rank[:, :, None]], dim=2).sort(dim=2).values
        drawn.append(torch.where(left > 0, rank, -1))
    return torch.stack(drawn, dim=2)


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
