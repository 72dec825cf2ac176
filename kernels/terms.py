"""The terms that patterns are made of; `kernels.patterns` has their constructors and rules."""

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels import spans
from kernels.algebra import Nothing, Pattern, Surroundings
from kernels.random_plan import draw_blocks
from kernels.spans import DEAD, FULL, LIVE, MIXED, UNKNOWN, Grid, Order, Spans
from kernels.tiles import settle, spans_of

_CELLS = 2**22  # tiles whose block layout is looked up at once, 16 MiB for each temporary


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    is_causal = sees_itself = True

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

    def _visible(self, i, j, head, length):
        distance = _block_of(i, self.block) - _block_of(j, self.block)
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

    def __repr__(self) -> str:
        return f"strided({self.stride})"


@dataclass(frozen=True, repr=False)
class Fixed(Pattern):
    length: int
    cells: int
    sub_block: int = 0

    sees_itself = True

    @property
    def first(self) -> int:
        """The first summary cell of a block."""
        return self.length - self.cells * (self.sub_block + 1)

    def _visible(self, i, j, head, length):
        cell = j % self.length
        summary = (cell >= self.first) & (cell < self.first + self.cells)
        return summary | (i // self.length == j // self.length)

    def _spans(self, grid):
        same_block = spans.band(grid, 0, 0, self.length)
        summary = self._summary(grid)
        if isinstance(summary, int):
            return same_block | spans.constant(grid, summary)
        state = summary[:, None].expand(grid.groups, grid.rows, grid.columns)
        return same_block | spans.from_states(state.flatten(0, 1), grid.columns)

    def _summary(self, grid: Grid) -> int | Tensor:
        """What is known of the summary cells of each key tile, one for all or ``(groups, C)``."""
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
        option = f", sub_block={self.sub_block}" if self.sub_block else ""
        return f"fixed({self.length}, {self.cells}{option})"


@dataclass(frozen=True, repr=False)
class GlobalTokens(Pattern):
    count: int

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
        i, j = _block_of(i, self.block), _block_of(j, self.block)
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

    def _of_head(self, head):
        return self._of(head)._of_head(head)

    def _of(self, head: int) -> Pattern:
        return self.patterns[head % len(self.patterns)]

    def __repr__(self) -> str:
        return f"per_head({', '.join(map(repr, self.patterns))})"


@dataclass(frozen=True, repr=False)
class RandomBlocks(Pattern):
    count: int
    block: int
    seed: int = 0
    layer: int = 0
    surroundings: Surroundings | None = field(default=None, kw_only=True)  # None: not bound yet

    differs_by_head = True

    def plan(self, heads: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """The drawn key blocks, ``(heads, query blocks, count)`` int64, -1 where there were too few.

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
        parts = [
            _random_plan(self, seen, tuple(numbers), blocks, str(device))[:, :blocks]
            for seen, numbers in alike.items()
        ]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([head for numbers in alike.values() for head in numbers])
        return torch.cat(parts)[order.argsort().to(device)]

    def _visible(self, i, j, head, length):
        i_block, j_block = _block_of(i, self.block), _block_of(j, self.block)
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
            return spans.constant(grid, UNKNOWN)
        (q_low, q_high), (k_low, k_high) = grid.q_range, grid.k_range
        first, last = q_low[0] // self.block, q_high[0] // self.block  # blocks of a tile of queries
        numbers = first[:, None] + _up_to(grid.tile[0], self.block, grid.device)
        plan = self.plan(max(grid.heads) + 1, grid.length, grid.device)[list(grid.heads)]
        drawn = plan[:, numbers.clamp(max=plan.shape[1] - 1), :, None]  # (H, R, blocks, count, 1)
        column = drawn * self.block // grid.tile[1] + _up_to(self.block, grid.tile[1], grid.device)
        end = (drawn + 1) * self.block  # the first token after the drawn block
        exists = (drawn >= 0) & (numbers <= last[:, None])[:, :, None, None]
        exists = exists & (column * grid.tile[1] < end.clamp(max=grid.keys))
        at = column.clamp(0, grid.columns - 1)
        whole = (k_low[0, at] >= end - self.block) & (k_high[0, at] < end)
        whole = whole & (first == last)[:, None, None, None]
        row = torch.arange(len(grid.heads) * grid.rows, device=grid.device)
        key = row.view(-1, grid.rows, 1, 1, 1) * (grid.columns + 1) + column
        value = torch.where(whole, FULL, LIVE)
        return spans.from_cells(key[exists], value[exists], len(row), grid.columns, outside=DEAD)

    def _bind(self, surroundings):
        return self if self.surroundings else replace(self, surroundings=surroundings)

    def _without_random(self, replacement):
        return replacement

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
        candidates = allowed.combine(taken, spans.LEFT_OVER)
    else:
        candidates = allowed.map(spans.IF_LIVE)
    return draw_blocks(candidates, term.count, heads, (term.seed, term.layer, *numbers_in_hash))


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


def _up_to(size: int, part: int, device) -> Tensor:
    """0, 1, ... for as many parts as ``size`` tokens that start at a multiple of it may touch."""
    aligned = size % part == 0 or part % size == 0
    return torch.arange(-(-size // part) if aligned else (size - 2) // part + 2, device=device)


def _block_of(position: Tensor, block: int) -> Tensor:
    return position if block == 1 else position // block
