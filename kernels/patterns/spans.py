"""What a pattern says about tiles, as step functions: the machinery behind tile lists.

A row of tiles is cut into steps of neighbouring tiles of which the same is known, so that a window
or ``causal()`` takes a few numbers a row whatever the length. Terms state their steps by formula,
``&`` and ``|`` merge them, and only what no formula decides is looked at cell by cell.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# A tile is one of these; the value of a step is the sum of those that it may be.
DEAD, MIXED, FULL = 1, 2, 4  # no cell visible, some, all (of the cells that exist)
LIVE, OPEN, UNKNOWN = MIXED | FULL, DEAD | MIXED, DEAD | MIXED | FULL


@dataclass(frozen=True)
class Order:
    """How tokens are stored: where slot ``n`` of group ``g`` stands in the sequence.

    At ``(n // run) * step + first + g + n % run``. ``Order()`` is the sequence itself,
    ``Order(step=l, groups=l)`` its residue classes, ``Order(run=c, step=l, first=f)`` the ``c``
    tokens from number ``f`` of every block of ``l``.
    """

    run: int = 1
    step: int = 1
    first: int = 0
    groups: int = 1

    def position(self, group: Tensor | int, slot: Tensor) -> Tensor:
        if self.run == 1:
            return slot * self.step + (group + self.first)
        return slot // self.run * self.step + slot % self.run + (group + self.first)

    def filled(self, group: Tensor | int, length: int) -> Tensor:
        """How many slots of a group stand before ``length``."""
        rest = (length - self.first - torch.as_tensor(group)).clamp(min=0)
        return rest // self.step * self.run + (rest % self.step).clamp(max=self.run)

    def slots(self, length: int) -> int:
        """Slots of the longest group, the first one, that stand before ``length``."""
        return int(self.filled(0, length))


@dataclass(frozen=True, eq=False)
class Grid:
    """The tiles of queries and keys, each stored in an order of its own.

    The groups of both orders meet one to one; keys of one group are shared by all of the queries.

    Args:
        q_order, k_order: where the stored tokens stand.
        queries, keys: tokens of the sequence that there are.
        tile: tokens of a tile of (queries, keys).
        heads: numbers of the heads.
        device: where the steps are computed.
    """

    q_order: Order
    k_order: Order
    queries: int
    keys: int
    tile: tuple[int, int]
    heads: tuple[int, ...] = (0,)
    device: torch.device | str = "cpu"

    @property
    def length(self) -> int:
        """Tokens of the sequence that queries and keys are from."""
        return max(self.queries, self.keys)

    @property
    def groups(self) -> int:
        return self.q_order.groups

    @functools.cached_property
    def rows(self) -> int:
        """Tiles of queries of a group."""
        return -(-self.q_order.slots(self.queries) // self.tile[0])

    @functools.cached_property
    def columns(self) -> int:
        """Tiles of keys of a group."""
        return -(-self.k_order.slots(self.keys) // self.tile[1])

    @property
    def contiguous(self) -> bool:
        return self.q_order == self.k_order == Order()

    @property
    def unit(self) -> int | None:
        """The distance of neighbours, if queries and keys of a group are one evenly spaced set."""
        same = self.q_order == self.k_order and self.q_order.run == 1
        return self.q_order.step if same else None

    @functools.cached_property
    def q_range(self) -> tuple[Tensor, Tensor]:
        """First and last position of each tile of queries, ``(groups, rows)`` each."""
        return self._range(self.q_order, self.queries, self.tile[0], self.rows)

    @functools.cached_property
    def k_range(self) -> tuple[Tensor, Tensor]:
        """First and last position of each tile of keys, ``(groups, columns)`` each."""
        low, high = self._range(self.k_order, self.keys, self.tile[1], self.columns)
        shape = (self.groups, self.columns)
        return low.expand(shape).contiguous(), high.expand(shape).contiguous()

    def _range(self, order: Order, length: int, tile: int, tiles: int) -> tuple[Tensor, Tensor]:
        group = torch.arange(order.groups, device=self.device)[:, None]
        slot = torch.arange(tiles, device=self.device)[None, :] * tile
        if order == Order():
            last = (slot + tile - 1).clamp(max=length - 1)
        else:  # the last tile may be cut short; one without any token is never looked at
            filled = order.filled(group, length)
            last = torch.where(slot < filled, (slot + tile).clamp(max=filled), slot + tile) - 1
        return order.position(group, slot), order.position(group, last)

    def existing(self) -> "Spans":
        """Which tiles hold a token: groups of unequal length share one number of tiles."""
        group = torch.arange(self.groups, device=self.device)[:, None]
        k_group = group if self.k_order.groups > 1 else torch.zeros_like(group)
        columns = -(-self.k_order.filled(k_group, self.keys) // self.tile[1])
        first = torch.arange(self.rows, device=self.device)[None, :] * self.tile[0]
        columns = torch.where(first < self.q_order.filled(group, self.queries), columns, 0)
        return steps(self, [columns], [FULL, DEAD])


@dataclass(frozen=True, eq=False)
class Spans:
    """For every row of tiles what is known of them: a step function over the columns.

    Row ``(head * groups + group) * rows + n`` is tile ``n`` of the queries of a group.

    Args:
        key: ``row * (columns + 1) + first column`` of every step, ascending, ``(steps)`` int64;
            every row has a step at column 0.
        value: what a tile of the step may be, ``(steps)`` uint8.
        rows: number of rows, those of one head if the heads are alike.
        columns: tiles of a row.
    """

    key: Tensor
    value: Tensor
    rows: int
    columns: int

    @property
    def stride(self) -> int:
        return self.columns + 1

    def row_keys(self) -> Tensor:
        """The key of each row's first tile, and one more for the end, ``(rows + 1)``."""
        return torch.arange(self.rows + 1, device=self.key.device) * self.stride

    def widths(self) -> Tensor:
        """Tiles of each step."""
        end = torch.cat([self.key[1:], self.key.new_full((1,), self.rows * self.stride)])
        return end - (end % self.stride == 0).long() - self.key

    def cells(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The key and the value of every tile of the ``chosen`` steps."""
        width = self.widths()[chosen]
        step = torch.arange(len(width), device=width.device).repeat_interleave(width)
        first = self.key[chosen] - (width.cumsum(0) - width)
        return first[step] + torch.arange(len(step), device=step.device), self.value[chosen][step]

    def at(self, key: Tensor) -> Tensor:
        """The values of tiles."""
        return self.value[torch.searchsorted(self.key, key, right=True) - 1]

    def repeat(self, rows: int) -> "Spans":
        """The steps of one head for several, ``rows`` in all."""
        if rows == self.rows:
            return self
        heads = torch.arange(rows // self.rows, device=self.key.device)
        key = heads[:, None] * (self.rows * self.stride) + self.key
        return Spans(key.flatten(), self.value.repeat(len(heads)), rows, self.columns)

    def map(self, table: "Table") -> "Spans":
        return Spans(self.key, table(self.value), self.rows, self.columns)

    def combine(self, other: "Spans", table: "Table") -> "Spans":
        """``table`` of the values of both; one head's steps count for all heads of the other."""
        rows = max(self.rows, other.rows)
        a, b = self.repeat(rows), other.repeat(rows)
        place = torch.searchsorted(b.key, a.key)
        place += torch.arange(len(place), device=place.device)
        of_a = torch.zeros(len(a.key) + len(b.key), dtype=torch.bool, device=place.device)
        of_a[place] = True  # in the merged order, where equal keys have that of a first
        del place
        last_a = of_a.cumsum(0, dtype=torch.int32) - 1
        last_b = torch.arange(len(of_a), dtype=torch.int32, device=of_a.device) - last_a - 1
        key = torch.where(of_a, a.key.index_select(0, last_a), b.key[last_b])
        last_b[:-1] += key[1:] == key[:-1]
        value = table(a.value.index_select(0, last_a), b.value.index_select(0, last_b))
        del last_a, last_b
        return _compact(key, value, rows, self.columns)

    def __and__(self, other: "Spans") -> "Spans":
        return self.combine(other, AND)

    def __or__(self, other: "Spans") -> "Spans":
        return self.combine(other, OR)

    def __invert__(self) -> "Spans":
        return self.map(NOT)


def _compact(key: Tensor, value: Tensor, rows: int, columns: int) -> Spans:
    """Drop steps that no tile is in and those that repeat what the one before says."""
    column = key % (columns + 1)
    keep = column < columns
    keep[1:] &= (key[1:] != key[:-1]) & ((value[1:] != value[:-1]) | (column[1:] == 0))
    return _chosen(key, value, keep, rows, columns)


def _chosen(key: Tensor, value: Tensor, keep: Tensor, rows: int, columns: int) -> Spans:
    kept = keep.flatten().nonzero()[:, 0]  # once for both: on a GPU it waits for the count
    key, value = (x.flatten().index_select(0, kept) for x in (key, value))
    return Spans(key, value, rows, columns)


class Table:
    """A function of one or two values, looked up."""

    def __init__(self, function, arguments: int):
        values = range(8)
        entries = (
            [function(a) for a in values]
            if arguments == 1
            else [function(a, b) for a in values for b in values]
        )
        self.entries = torch.tensor(entries, dtype=torch.uint8)
        self._on = functools.lru_cache(self.entries.to)

    def __call__(self, *values: Tensor) -> Tensor:
        index = values[0].int() if len(values) == 1 else values[0].int() * 8 + values[1]
        return self._on(values[0].device).index_select(0, index)


def _negate(a: int) -> int:
    return a & MIXED | (FULL if a & DEAD else 0) | (DEAD if a & FULL else 0)


def _both(a: int, b: int) -> int:
    """What the cells that two tiles share may be: two mixed ones may share none."""
    possible = 0
    for x in (DEAD, MIXED, FULL):
        for y in (DEAD, MIXED, FULL):
            if a & x and b & y:
                possible |= OPEN if x == y == MIXED else min(x, y)
    return possible


AND = Table(_both, 2)
OR = Table(lambda a, b: _negate(_both(_negate(a), _negate(b))), 2)
NOT = Table(_negate, 1)
IF_LIVE = Table(lambda a: DEAD if a & DEAD else FULL, 1)
LEFT_OVER = Table(lambda a, b: FULL if b == DEAD and not a & DEAD else DEAD, 2)
OTHERS = Table(lambda a: {DEAD: FULL, FULL: DEAD, MIXED: MIXED}.get(a, LIVE), 1)
EXISTING = Table(lambda a, b: a if b == FULL else DEAD, 2)
KNOWING = Table(lambda a, b: a & b, 2)  # two true statements about the same tiles
REPLACED = Table(lambda a, b: b or a, 2)  # the second where it says anything


def constant(grid: Grid, value: int) -> Spans:
    return steps(grid, [], [value])


def steps(grid: Grid, edges: list[Tensor], values: list[int] | Tensor) -> Spans:
    """Steps between ascending columns.

    Args:
        edges: where one step ends and the next begins, each broadcasts to ``(groups, rows)``.
        values: one more than edges: the same for all rows, or ``(groups, rows, values)``.
    """
    rows, stride, device = grid.groups * grid.rows, grid.columns + 1, grid.device
    shape = (grid.groups, grid.rows)
    key = torch.arange(rows, device=device)[:, None] * stride
    if edges:
        edges = torch.stack([e.expand(shape) for e in edges], dim=2)
        key = torch.cat([key, key + edges.view(rows, -1)], dim=1)
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=torch.uint8, device=device)
    value = values.expand(*shape, key.shape[1]).reshape(key.shape)
    end = torch.cat([key[:, 1:], key[:, :1] + grid.columns], dim=1)
    return _chosen(key, value, key < end, rows, grid.columns)


def from_cells(key: Tensor, value: Tensor, rows: int, columns: int, outside: int = 0) -> Spans:
    """Steps of single tiles in any order; the largest value of equal keys counts.

    Everywhere else the value is ``outside``, which must be the smallest.
    """
    start = torch.arange(rows, device=key.device) * (columns + 1)
    code = torch.cat([start * 8 + outside, key * 8 + value, key * 8 + (8 + outside)])
    code = code.sort(descending=True).values
    key = code >> 3
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    code = code[first].flip(0)
    return _compact(code >> 3, (code & 7).to(torch.uint8), rows, columns)


def from_states(state: Tensor, columns: int) -> Spans:
    """Steps of ``state (rows, columns or fewer)`` uint8; tiles that it lacks are dead."""
    rows = len(state)
    change = torch.ones_like(state, dtype=torch.bool)
    change[:, 1:] = state[:, 1:] != state[:, :-1]
    row, column = change.nonzero(as_tuple=True)
    key, value = row * (columns + 1) + column, state[row, column]
    if state.shape[1] < columns:
        end = torch.arange(rows, device=key.device) * (columns + 1) + state.shape[1]
        key, order = torch.cat([key, end]).sort()
        value = torch.cat([value, torch.full_like(end, DEAD, dtype=torch.uint8)])[order]
    return Spans(key, value, rows, columns)


def assemble(parts: list[tuple[Spans, list[int]]], grid: Grid) -> Spans:
    """Put steps of some heads each in the places of those heads among ``grid.heads``."""
    rows = grid.groups * grid.rows  # of a head
    size, keys = rows * (grid.columns + 1), []
    for part, places in parts:
        key = part.repeat(len(places) * rows).key
        place = torch.tensor(places, device=key.device)
        keys.append(place[key // size] * size + key % size)
    key, order = torch.cat(keys).sort()
    value = torch.cat([p.repeat(len(places) * rows).value for p, places in parts])[order]
    return Spans(key, value, len(grid.heads) * rows, grid.columns)


def band(grid: Grid, left: int | None, right: int, block: int = 1) -> Spans:
    """Keys from ``left`` before the query (None: all) to ``right`` after it, counted in blocks.

    Whether all of a tile lies in the band shows in its corners. So does whether any of it does,
    where distances take every value in between.
    """
    unit = grid.unit if block == 1 or grid.unit == 1 else None
    edge = MIXED if unit or left is None else OPEN
    q_low, q_high = (x // block for x in grid.q_range) if block > 1 else grid.q_range
    k_low, k_high = (x // block for x in grid.k_range) if block > 1 else grid.k_range
    right = right // unit * unit if unit else right
    full_end = torch.searchsorted(k_high, q_low + right, right=True)
    live_end = torch.searchsorted(k_low, q_high + right, right=True)
    if left is None:
        return steps(grid, [full_end, live_end], [FULL, edge, DEAD])
    left = left // unit * unit if unit else left
    live_start = torch.searchsorted(k_high, q_low - left)
    full_start = torch.searchsorted(k_low, q_high - left)
    edges = [live_start, full_start, torch.maximum(full_start, full_end), live_end]
    return steps(grid, edges, [DEAD, edge, FULL, edge, DEAD])


def meeting(grid: Grid, where: int, elsewhere: int) -> Spans:
    """``where`` the range of the queries' positions meets that of the keys, and ``elsewhere``."""
    (q_low, q_high), (k_low, k_high) = grid.q_range, grid.k_range
    start, end = torch.searchsorted(k_high, q_low), torch.searchsorted(k_low, q_high, right=True)
    return steps(grid, [start, end], [elsewhere, where, elsewhere])
