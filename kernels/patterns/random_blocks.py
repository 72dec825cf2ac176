"""The term ``random_blocks`` and its draw: uniform, without replacement, a function of integers.

Every rank, a resumed run and the backward pass draw the same blocks, because nothing but the
arguments enters: no generator, no state.
"""

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.patterns.algebra import Nothing, Pattern, Surroundings
from kernels.patterns.spans import (
    DEAD,
    FULL,
    IF_LIVE,
    LEFT_OVER,
    LIVE,
    UNKNOWN,
    Grid,
    Order,
    Spans,
    constant,
    from_cells,
)
from kernels.patterns.tiles import settle, spans_of


@dataclass(frozen=True, repr=False)
class RandomBlocks(Pattern):
    count: int
    block: int
    seed: int = 0
    layer: int = 0
    surroundings: Surroundings | None = field(default=None, kw_only=True)  # None: not bound yet

    differs_by_head = True

    def plan(self, heads: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """Drawn key blocks, ``(heads, query blocks, count)`` int64, -1 where candidates ran out.

        Of a term that was never bound, every block is a candidate.
        """
        blocks = -(-length // self.block)
        surroundings = self.surroundings or Surroundings()
        alike: dict[Surroundings, list[int]] = {}  # heads by what surrounds them
        if surroundings.differ_by_head:
            for head in range(heads):
                alike.setdefault(surroundings.of_head(head), []).append(head)
        else:
            alike[surroundings] = list(range(heads))
        parts = []
        for seen, numbers in alike.items():
            # A causal row does not depend on the length: one plan serves all up to a power of two.
            rows = 1 << (blocks - 1).bit_length() if seen.around.is_causal else blocks
            plan = _random_plan(self, seen, tuple(numbers), rows, str(device))
            parts.append(plan[:, :blocks])
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([head for numbers in alike.values() for head in numbers])
        return torch.cat(parts)[order.argsort().to(device)]

    def _visible(self, i, j, head, length):
        i_block, j_block = block_of(i, self.block), block_of(j, self.block)
        heads = int(head.max() if isinstance(head, Tensor) else head) + 1
        if length is None:
            if not self.surroundings.around.is_causal:
                raise ValueError(
                    f"{self!r} without causal() depends on the number of tokens, got length=None; "
                    f"pass `length`."
                )
            length = (int(i_block.max()) + 1) * self.block  # no row depends on the length
        head = head.to(i.device) if isinstance(head, Tensor) else head
        drawn = self.plan(heads, length, i.device)[head, i_block]  # (..., count)
        seen = torch.zeros_like(i + j, dtype=torch.bool)
        for n in range(self.count):
            seen = seen | (drawn[..., n] == j_block)
        return seen

    def _spans(self, grid):
        if not grid.contiguous:
            return constant(grid, UNKNOWN)
        (q_low, q_high), (k_low, k_high) = grid.q_range, grid.k_range
        first, last = q_low[0] // self.block, q_high[0] // self.block  # blocks of a tile of queries
        numbers = first[:, None] + _up_to(grid.tile[0], self.block, grid.device)
        plan = self.plan(max(grid.heads) + 1, grid.length, grid.device)[list(grid.heads)]
        drawn = plan[:, numbers.clamp(max=plan.shape[1] - 1), :, None]  # (H, R, blocks, count, 1)
        column = drawn * self.block // grid.tile[1] + _up_to(self.block, grid.tile[1], grid.device)
        end = (drawn + 1) * self.block  # the first token after the drawn block
        exists = (drawn >= 0) & (numbers <= last[:, None])[:, :, None, None]
        exists = exists & (drawn * self.block < grid.keys) & (column <= (end - 1) // grid.tile[1])
        exists = exists & (column < grid.columns)
        at = column.clamp(0, grid.columns - 1)
        whole = (k_low[0, at] >= end - self.block) & (k_high[0, at] < end)
        whole = whole & (first == last)[:, None, None, None]
        row = torch.arange(len(grid.heads) * grid.rows, device=grid.device)
        key = row.view(-1, grid.rows, 1, 1, 1) * (grid.columns + 1) + column
        value = torch.where(whole, FULL, LIVE)
        key, value = key[exists], value[exists]
        del numbers, drawn, column, end, exists, at, whole  # a million tokens: 0.4 MiB each
        return from_cells(key, value, len(row), grid.columns, outside=DEAD)

    def _bind(self, surroundings):
        return self if self.surroundings else replace(self, surroundings=surroundings)

    def _without_random(self, replacement):
        return replacement

    def on_layer(self, layer):
        return replace(self, layer=self.layer + layer)

    def __repr__(self) -> str:
        options = "".join(f", {k}={v}" for k in ("seed", "layer") if (v := getattr(self, k)))
        return f"random_blocks({self.count}, block={self.block}{options})"


@functools.lru_cache(maxsize=64)
def _random_plan(
    term: RandomBlocks, surroundings: Surroundings, heads: tuple[int, ...], blocks: int, device: str
) -> Tensor:
    around, beside = surroundings.around, surroundings.beside
    numbers_in_hash = () if around.is_causal else (blocks,)
    length = blocks * term.block
    grid = Grid(Order(), Order(), length, length, (term.block, term.block), device=device)
    allowed = settle(around, grid, spans_of(around, grid))
    if beside != Nothing():
        taken = settle(around & beside, grid, spans_of(around & beside, grid))
        candidates = allowed.combine(taken, LEFT_OVER)
    else:
        candidates = allowed.map(IF_LIVE)
    return draw_blocks(candidates, term.count, heads, (term.seed, term.layer, *numbers_in_hash))


def draw_blocks(
    candidates: Spans, count: int, heads: tuple[int, ...], key: tuple[int, ...]
) -> Tensor:
    """Draw up to ``count`` key blocks for every head and query block.

    Draw number ``n`` of a row takes the ``(hash mod left)``-th of the ``left`` candidates that the
    draws before it have left over, counted from block 0.

    Args:
        candidates: which key blocks may be drawn for each query block: the full ones.
        count: blocks to draw for each query block.
        heads: numbers of the heads, each with draws of its own.
        key: integers that select the plan (seed, layer, ...).

    Returns:
        Drawn key blocks, ``(heads, query blocks, count)`` int64, -1 where candidates ran out.
    """
    device = candidates.key.device
    width = torch.where(candidates.value == FULL, candidates.widths(), 0)
    last = width.cumsum(0)  # candidates up to the end of each step, over all rows
    step = torch.searchsorted(candidates.key, candidates.row_keys())
    before = torch.cat([last.new_zeros(1), last])[step]  # ... before each row, and in all
    head = torch.tensor(heads, device=device)[:, None]
    row = torch.arange(candidates.rows, device=device)[None, :]
    rank = _draw_ranks(before.diff(), count, key, head, row)
    place = before[:-1, None] + rank  # among the candidates of all rows
    step = torch.searchsorted(last, place, right=True).clamp(max=len(last) - 1)
    block = candidates.key[step] % candidates.stride + place - (last - width)[step]
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


def _up_to(size: int, part: int, device) -> Tensor:
    """0, 1, ... for as many parts as ``size`` tokens that start at a multiple of it may touch."""
    aligned = size % part == 0 or part % size == 0
    return torch.arange(-(-size // part) if aligned else (size - 2) // part + 2, device=device)


def block_of(position: Tensor, block: int) -> Tensor:
    return position if block == 1 else position // block
