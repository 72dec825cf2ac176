"""The terms that patterns are made of; `kernels.patterns` has their constructors and rules."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.patterns import spans
from kernels.patterns.algebra import ANY_LENGTH, Pattern
from kernels.patterns.random_blocks import RandomBlocks, block_of
from kernels.patterns.spans import DEAD, FULL, MIXED, UNKNOWN, Grid, Order, Spans

__all__ = [
    "Blocks",
    "Causal",
    "Dilated",
    "Fixed",
    "GlobalTokens",
    "Others",
    "PerHead",
    "RandomBlocks",
    "Strided",
    "Summary",
    "Window",
]

_CELLS = 2**22  # tiles whose block layout is looked up at once, 16 MiB for each temporary


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    is_causal = sees_itself = True
    shows_past = ANY_LENGTH

    def _visible(self, i, j, head, length):
        return j <= i

    def _spans(self, grid):
        return spans.band(grid, None, 0)

    def __repr__(self) -> str:
        return "causal()"


@dataclass(frozen=True, repr=False)
class Window(Pattern):
    left: int
    right: int
    block: int

    sees_itself = True

    @property
    def is_causal(self) -> bool:
        return self.right == 0 and self.block == 1

    @property
    def shows_past(self) -> int:
        return (self.left + 1) * self.block

    @property
    def shows_future(self) -> int:
        return (self.right + 1) * self.block

    def _visible(self, i, j, head, length):
        distance = block_of(i, self.block) - block_of(j, self.block)
        return (distance <= self.left) & (distance >= -self.right)

    def _spans(self, grid):
        return spans.band(grid, self.left, self.right, self.block)

    def __repr__(self) -> str:
        width = f"{self.left + 1}" if self.right == 0 else f"{self.left}, {self.right}"
        return f"window({width})" if self.block == 1 else f"window({width}, block={self.block})"


@dataclass(frozen=True, repr=False)
class Dilated(Pattern):
    left: int
    right: int
    step: int

    sees_itself = True

    @property
    def is_causal(self) -> bool:
        return self.right == 0

    def _visible(self, i, j, head, length):
        distance = i - j
        near = (distance <= self.left * self.step) & (distance >= -self.right * self.step)
        return near & (distance % self.step == 0)

    def _spans(self, grid):
        left, right = self.left * self.step, self.right * self.step
        if grid.unit and grid.unit % self.step == 0:
            return spans.band(grid, left, right)
        near = spans.band(grid, left, right)
        if grid.contiguous:
            # Both ends of the band are seen: a tile that meets it and is wide enough holds a cell.
            near = near.map(spans.IF_LIVE)
        return near & _every(grid, self.step)

    def _at(self, grid, key):
        return _multiples_at(grid, key, self.step, -self.right * self.step, self.left * self.step)

    def __repr__(self) -> str:
        width = f"{self.left + 1}" if self.right == 0 else f"{self.left}, {self.right}"
        return f"dilated({width}, {self.step})"


@dataclass(frozen=True, repr=False)
class Strided(Pattern):
    stride: int

    sees_itself = True

    def _visible(self, i, j, head, length):
        return (i - j) % self.stride == 0

    def _spans(self, grid):
        return _every(grid, self.stride)

    def _at(self, grid, key):
        return _multiples_at(grid, key, self.stride, -grid.length, grid.length)

    def __repr__(self) -> str:
        return f"strided({self.stride})"


@dataclass(frozen=True, repr=False)
class Summary(Pattern):
    length: int
    cells: int
    sub_block: int = 0

    @property
    def first(self) -> int:
        """The first summary cell of a block."""
        return self.length - self.cells * (self.sub_block + 1)

    def _visible(self, i, j, head, length):
        cell = j % self.length
        return ((cell >= self.first) & (cell < self.first + self.cells)).expand_as(i + j)

    def _spans(self, grid):
        summary = self._state(grid)
        if isinstance(summary, int):
            return spans.constant(grid, summary)
        state = summary[:, None].expand(grid.groups, grid.rows, grid.columns)
        return spans.from_states(state.flatten(0, 1), grid.columns)

    def _state(self, grid: Grid) -> int | Tensor:
        """What is known of each key tile, one for all or ``(groups, C)``."""
        if grid.k_order == Order(self.cells, self.length, self.first):
            return FULL
        low, high = grid.k_range
        before = [
            x // self.length * self.cells + (x % self.length - self.first).clamp(0, self.cells)
            for x in (low, high + 1)
        ]
        between = before[1] - before[0]  # summary cells from the first to the last position
        # In other orders, the positions between are not all in the tile.
        some = MIXED if grid.k_order == Order() else UNKNOWN
        state = torch.where(between == high - low + 1, FULL, some)
        return torch.where(between == 0, DEAD, state).to(torch.uint8)

    def __repr__(self) -> str:
        return f"summary({_sizes(self)})"


@dataclass(frozen=True, repr=False)
class Fixed(Pattern):
    length: int
    cells: int
    sub_block: int = 0

    sees_itself = True

    @property
    def local(self) -> Window:
        """The part that is the query's own block."""
        return Window(0, 0, self.length)

    @property
    def summary(self) -> Summary:
        """The part that is the summary cells of all blocks."""
        return Summary(self.length, self.cells, self.sub_block)

    def _visible(self, i, j, head, length):
        own_block = self.local._visible(i, j, head, length)
        return own_block | self.summary._visible(i, j, head, length)

    def _spans(self, grid):
        return self.local._spans(grid) | self.summary._spans(grid)

    def __repr__(self) -> str:
        return f"fixed({_sizes(self)})"


def _sizes(term: Summary | Fixed) -> str:
    option = f", sub_block={term.sub_block}" if term.sub_block else ""
    return f"{term.length}, {term.cells}{option}"


@dataclass(frozen=True, repr=False)
class GlobalTokens(Pattern):
    count: int

    @property
    def shows_past(self) -> int:
        return self.count

    shows_future = shows_past

    def _visible(self, i, j, head, length):
        return (i < self.count) | (j < self.count)

    def _spans(self, grid):
        (q_low, q_high), (k_low, k_high) = grid.q_range, grid.k_range
        full, live = ((x < self.count).sum(dim=1, keepdim=True) for x in (k_high, k_low))
        beyond = torch.where(q_low < self.count, MIXED, DEAD)
        beyond = torch.where(q_high < self.count, FULL, beyond)
        values = [torch.full_like(beyond, FULL), beyond.clamp(min=MIXED), beyond]
        return spans.steps(grid, [full, live], torch.stack(values, dim=2).to(torch.uint8))

    def __repr__(self) -> str:
        return f"global_tokens({self.count})"


@dataclass(frozen=True, repr=False)
class Blocks(Pattern):
    layout: tuple[str, ...]
    block: int

    def _visible(self, i, j, head, length):
        seen = _layout(self.layout, str(i.device))
        i, j = block_of(i, self.block), block_of(j, self.block)
        inside = (i < len(seen)) & (j < len(seen))
        return seen[i.clamp(max=len(seen) - 1), j.clamp(max=len(seen) - 1)] & inside

    def _spans(self, grid):
        some = MIXED if grid.contiguous else UNKNOWN
        states = []
        sums = torch.nn.functional.pad(
            _layout(self.layout, str(grid.device)).int().cumsum(0).cumsum(1), (1, 0, 1, 0)
        )
        (q_low, q_high), (k_low, k_high) = (
            (low // self.block, high // self.block + 1)
            for low, high in (grid.q_range, grid.k_range)
        )
        columns = max(1, int((k_low < len(self.layout)).sum(dim=1).max()))
        group = torch.arange(grid.groups, device=q_low.device).repeat_interleave(grid.rows)
        q_low, q_high, last = q_low.flatten(), q_high.flatten(), len(self.layout)
        for row in torch.arange(len(group), device=group.device).split(max(1, _CELLS // columns)):
            left, right = (x[group[row], :columns] for x in (k_low, k_high))
            top, bottom = (x[row, None] for x in (q_low, q_high))
            area = (bottom - top) * (right - left)
            left, right, top, bottom = (x.clamp(max=last) for x in (left, right, top, bottom))
            seen = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
            state = torch.where(seen == area, FULL, some)
            states.append(torch.where(seen == 0, DEAD, state).to(torch.uint8))
        return spans.from_states(torch.cat(states), grid.columns)

    def __repr__(self) -> str:
        return f"blocks({'/'.join(self.layout)!r}, block={self.block})"


@dataclass(frozen=True, repr=False)
class Others(Pattern):
    def _visible(self, i, j, head, length):
        return i != j

    def _spans(self, grid):
        # A tile of one cell on the diagonal has no other; a larger one has, in whatever order.
        return spans.band(grid, 0, 0).map(spans.OTHERS)

    def __repr__(self) -> str:
        return "others()"


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    patterns: tuple[Pattern, ...]

    @property
    def differs_by_head(self) -> bool:
        return len(set(self.patterns)) > 1 or self.patterns[0].differs_by_head

    @property
    def variants(self) -> int:
        return max(len(self.patterns), *(pattern.variants for pattern in self.patterns))

    @property
    def is_causal(self) -> bool:
        return all(pattern.is_causal for pattern in self.patterns)

    @property
    def sees_itself(self) -> bool:
        return all(pattern.sees_itself for pattern in self.patterns)

    def _visible(self, i, j, head, length):
        if not isinstance(head, Tensor):
            return self._of(head)._visible(i, j, head, length)
        number = head.to(i.device) % len(self.patterns)
        seen = self.patterns[0]._visible(i, j, head, length)
        for n, pattern in enumerate(self.patterns[1:], start=1):
            seen = torch.where(number == n, pattern._visible(i, j, head, length), seen)
        return seen

    def _spans(self, grid):
        parts = []
        for n, pattern in enumerate(self.patterns):
            places = [p for p, h in enumerate(grid.heads) if h % len(self.patterns) == n]
            if places:
                part = replace(grid, heads=tuple(grid.heads[p] for p in places))
                parts.append((pattern._spans(part), places))
        return spans.assemble(parts, grid)

    def _bind(self, surroundings):
        return PerHead(tuple(p._bind(surroundings) for p in self.patterns))

    def _without_random(self, replacement):
        return PerHead(tuple(p._without_random(replacement) for p in self.patterns))

    def on_layer(self, layer):
        return PerHead(tuple(p.on_layer(layer) for p in self.patterns))

    def _of_head(self, head):
        return self._of(head)._of_head(head)

    def _of(self, head: int) -> Pattern:
        return self.patterns[head % len(self.patterns)]

    def __repr__(self) -> str:
        return f"per_head({', '.join(map(repr, self.patterns))})"


@functools.lru_cache(maxsize=16)
def _layout(rows: tuple[str, ...], device: str) -> Tensor:
    """Block layout text, ``(N, N)`` bool."""
    return torch.tensor([[cell == "x" for cell in row] for row in rows], device=device)


def _every(grid: Grid, stride: int) -> Spans:
    """What is known of the cells whose distance is a multiple of ``stride``."""
    q, k = grid.q_order, grid.k_order
    evenly = q.run == k.run == 1 and q.step % stride == k.step % stride == 0
    if stride == 1 or (evenly and q.groups == k.groups and (q.first - k.first) % stride == 0):
        return spans.constant(grid, FULL)
    if not grid.contiguous:
        return spans.constant(grid, UNKNOWN)
    # A tile shows `rows + columns - 1` neighbouring distances; only the last column may be short.
    (q_low, q_high), (k_low, k_high) = grid.q_range, grid.k_range
    width = (q_high - q_low)[:, :, None] + (k_high - k_low)[:, None, [0, -1]] + 1
    values = torch.where(width >= stride, MIXED, UNKNOWN).to(torch.uint8)
    return spans.steps(grid, [torch.full_like(q_low, grid.columns - 1)], values)


def _multiples_at(grid: Grid, key: Tensor, step: int, least: int, most: int) -> Tensor | None:
    """Which tiles hold a distance ``i - j`` from ``least`` to ``most`` that ``step`` divides."""
    if not grid.contiguous:
        return None
    (q_low, q_high), (k_low, k_high) = grid.q_range, grid.k_range
    row, column = key // (grid.columns + 1) % grid.rows, key % (grid.columns + 1)
    first, last = q_low[0, row] - k_high[0, column], q_high[0, row] - k_low[0, column]
    inner_first, inner_last = first.clamp(min=least), last.clamp(max=most)
    some = inner_last // step * step >= inner_first
    # Of two neighbouring distances, a step of 2 or more skips one.
    every = (first == last) | (step == 1) & (first == inner_first) & (last == inner_last)
    seen = torch.where(every, FULL, MIXED)
    return torch.where(some, seen, DEAD).to(torch.uint8)
