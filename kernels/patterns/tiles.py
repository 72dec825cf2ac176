"""Which tiles of keys each tile of queries visits, as a compressed list."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.patterns.spans import (
    DEAD,
    EXISTING,
    FULL,
    KNOWING,
    MIXED,
    REPLACED,
    Grid,
    Order,
    Spans,
    from_cells,
)

_CELLS = 2**18  # evaluated at once: 1 MiB for each int32 temporary, which stays in a CPU's cache
_COUNTED = 32  # tokens of a tile when cells are counted: few rows of tiles, few cells at the edges


@dataclass(frozen=True, eq=False)
class TileList:
    """Live tiles of every head, row by row (compressed sparse rows).

    Row ``(h * groups + g) * tiles + n`` holds the key tiles that query tile ``n`` of group ``g`` of
    head ``h`` visits: ``keys[offsets[row] : offsets[row + 1]]``, ascending.

    Args:
        offsets: ``(heads * rows + 1)`` int32.
        keys: key tile numbers inside the group, ``(live tiles)`` int32.
        full: whether every cell of the tile is visible, ``(live tiles)`` bool; cells past the last
            token do not count, and a tile that is full may be listed as not full.
        shape: rows of query tiles, those of all groups, and key tiles of a group.
        tile: tokens of a tile of (queries, keys).
        groups: groups of tokens that are stored one after another and do not see each other.
    """

    offsets: Tensor
    keys: Tensor
    full: Tensor
    shape: tuple[int, int]
    tile: tuple[int, int]
    groups: int = 1

    @classmethod
    def from_layout(cls, layout: Tensor, tile: tuple[int, int]) -> "TileList":
        """List the true tiles of ``layout (heads, query tiles, key tiles)`` bool, none as full."""
        heads, queries, keys = layout.shape
        offsets = torch.zeros(heads * queries + 1, dtype=torch.int32, device=layout.device)
        offsets[1:] = layout.sum(dim=2).flatten().cumsum(0)
        numbers = layout.nonzero()[:, 2].int()
        full = torch.zeros_like(numbers, dtype=torch.bool)
        return cls(offsets, numbers, full, (queries, keys), tile)

    def __len__(self) -> int:
        """Live tiles over all heads."""
        return len(self.keys)

    @property
    def heads(self) -> int:
        return (len(self.offsets) - 1) // self.shape[0]

    def rows(self) -> Tensor:
        """The row of every listed tile, ``(live tiles)`` int32."""
        count = self.offsets.diff()
        row = torch.arange(len(count), dtype=torch.int32, device=count.device)
        return row.repeat_interleave(count, output_size=len(self))

    def layout(self) -> Tensor:
        """The listed tiles, ``(heads, rows, key tiles)`` bool."""
        shape = (self.heads * self.shape[0], self.shape[1])
        layout = torch.zeros(shape, dtype=torch.bool, device=self.keys.device)
        layout[self.rows(), self.keys] = True
        return layout.view(self.heads, *self.shape)

    def inverse(self) -> "TileList":
        """The query tiles that visit each key tile: the same tiles, listed by column.

        Row ``(h * groups + g) * key tiles + m`` holds the numbers, inside the group, of the query
        tiles that visit key tile ``m`` of group ``g`` of head ``h``, ascending.
        """
        queries, keys = self.shape[0] // self.groups, self.shape[1]
        row = self.rows()
        column = row // queries * keys + self.keys
        column, order = column.sort(stable=True)
        wanted = torch.arange(self.heads * self.groups * keys + 1, device=column.device)
        offsets = torch.searchsorted(column, wanted.int(), out_int32=True)
        number = (row % queries)[order]
        shape, tile = (self.groups * keys, queries), self.tile[::-1]
        return TileList(offsets, number, self.full[order], shape, tile, self.groups)


def list_tiles(
    pattern,
    q_order: Order,
    k_order: Order,
    queries: int,
    keys: int,
    tile: tuple[int, int],
    heads: int = 1,
    device: torch.device | str = "cpu",
) -> TileList:
    """List the tiles with at least one visible cell, in O(listed tiles) time and memory.

    Args:
        pattern: a ``Pattern``.
        q_order, k_order: how queries and keys are stored: groups of both meet one to one, or one
            group of keys meets all groups of queries.
        queries, keys: tokens of the sequence that there are.
        tile: tokens of a tile of (queries, keys).
        heads: number of heads; the list has one if they are alike.
        device: where to compute the list.

    Raises:
        ValueError: if a size is not positive, or the groups do not fit.
    """
    sizes = {"queries": queries, "keys": keys, "tile": min(tile), "heads": heads}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={size}.")
    if k_order.groups not in (1, q_order.groups):
        raise ValueError(
            f"keys must have one group or as many as the queries, "
            f"got {k_order.groups} and {q_order.groups}."
        )
    pattern = pattern.bound()
    numbers = tuple(range(heads)) if pattern.differs_by_head else (0,)
    grid = Grid(q_order, k_order, queries, keys, tile, numbers, torch.device(device))
    spans = settle(pattern, grid, spans_of(pattern, grid))
    key, value = spans.cells(spans.value != DEAD)
    offsets = torch.searchsorted(key, spans.row_keys(), out_int32=True)
    shape = (grid.groups * grid.rows, grid.columns)
    numbers, full = (key % spans.stride).int(), value == FULL
    return TileList(offsets, numbers, full, shape, tile, grid.groups)


def count_cells(pattern, length: int, heads: int) -> int:
    """Visible cells of ``heads`` heads over ``length`` queries and keys, counted exactly.

    Of a tile that is seen whole no cell is looked at.
    """
    pattern = pattern.bound()
    tile = (_COUNTED, _COUNTED)
    grid = Grid(Order(), Order(), length, length, tile, tuple(range(heads)))
    spans = spans_of(pattern, grid)
    full = spans.value == FULL
    key, width = spans.key[full], spans.widths()[full]
    (q_low, q_high), (k_low, k_high) = grid.q_range, grid.k_range
    row, column = key // spans.stride % grid.rows, key % spans.stride
    queries = q_high[0, row] - q_low[0, row] + 1
    keys = k_high[0, column + width - 1] - k_low[0, column] + 1
    cells = int((queries * keys).sum())
    key, value = _cells(pattern, grid, spans, (spans.value != FULL) & (spans.value != DEAD))
    for seen, exists in _seen(pattern, grid, key[value != DEAD]):
        cells += int((seen & exists).sum())
    return cells


def spans_of(pattern, grid: Grid) -> Spans:
    """What the formulas of a bound pattern say about the tiles, for every head of the grid."""
    spans = pattern._spans(grid)
    if not grid.contiguous:
        spans = spans.combine(grid.existing(), EXISTING)
    return spans.repeat(len(grid.heads) * grid.groups * grid.rows)


def settle(pattern, grid: Grid, spans: Spans) -> Spans:
    """Look at the cells of every tile that may be dead or not, so that none is in doubt."""
    key, value = _cells(pattern, grid, spans, _in_doubt(spans.value))
    if not len(key):
        return spans
    left = _in_doubt(value).nonzero()[:, 0]
    states = []
    for seen, exists in _seen(pattern, grid, key[left]):
        some = (seen & exists).flatten(1).any(dim=1)
        every = (seen | ~exists).flatten(1).all(dim=1)
        states.append(torch.where(every, FULL, torch.where(some, MIXED, DEAD)).to(torch.uint8))
    if states:
        value[left] = torch.cat(states)
    return spans.combine(from_cells(key, value, spans.rows, spans.columns), REPLACED)


def _in_doubt(value: Tensor) -> Tensor:
    return (value & DEAD != 0) & (value != DEAD)


def _cells(pattern, grid: Grid, spans: Spans, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The key and the value of every tile of the chosen steps, told as well as formulas can."""
    key, value = spans.cells(chosen)
    known = pattern._at(grid, key) if len(key) else None
    return key, value if known is None else KNOWING(value, known)


def _seen(pattern, grid: Grid, key: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The cells of tiles, some at a time: which are visible and which exist, ``(tiles, *tile)``."""
    slots = [torch.arange(size, device=key.device) for size in grid.tile]
    heads = torch.tensor(grid.heads, device=key.device)
    for part in key.split(max(1, _CELLS // (grid.tile[0] * grid.tile[1]))):
        if not len(part):
            return
        row, column = (x[:, None] for x in (part // (grid.columns + 1), part % (grid.columns + 1)))
        group = row // grid.rows % grid.groups
        k_group = group if grid.k_order.groups > 1 else 0
        i = grid.q_order.position(group, row % grid.rows * grid.tile[0] + slots[0])
        j = grid.k_order.position(k_group, column * grid.tile[1] + slots[1])
        i, j = i.int()[:, :, None], j.int()[:, None, :]
        exists = (i < grid.queries) & (j < grid.keys)
        head = heads[row // (grid.groups * grid.rows)][:, :, None]
        # A position that does not exist has no row in a random plan: any that exists will do.
        i, j = i.clamp(max=grid.queries - 1), j.clamp(max=grid.keys - 1)
        seen = pattern._visible(i, j, head if len(grid.heads) > 1 else grid.heads[0], grid.length)
        yield seen.expand_as(exists), exists
