"""The list of tiles that kernels visit, in compressed rows; `find_tiles.py` finds them."""

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.patterns.algebra import LARGEST, Not, Pattern
from kernels.patterns.find_tiles import find, look
from kernels.patterns.grid import Grid
from kernels.patterns.order import SEQUENCE, Order

_COUNTED = 32  # tokens of a tile when cells are counted: few rows of tiles, few cells at the edges


@dataclass(frozen=True, eq=False)
class TileList:
    """Live tiles of every head, row by row (compressed sparse rows).

    Row ``(h * residues + r) * tiles + n`` holds the key tiles that query tile ``n`` of residue
    ``r`` of head ``h`` visits: ``keys[offsets[row] : offsets[row + 1]]``, ascending.

    Args:
        offsets: ``(heads * rows + 1)`` int32.
        keys: numbers of key tiles inside the residue, ``(live tiles)`` int32.
        full: whether every cell of the tile is visible, ``(live tiles)`` bool; cells past the last
            token do not count, and a tile that is full may be listed as not full.
        shape: rows of query tiles, those of all residues, and key tiles of a residue.
        tile: tokens of a tile of (queries, keys).
        residues: classes of tokens that are stored one after another and do not see each other.
    """

    offsets: Tensor
    keys: Tensor
    full: Tensor
    shape: tuple[int, int]
    tile: tuple[int, int]
    residues: int = 1

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

        Row ``(h * residues + r) * key tiles + m`` holds the numbers, inside the residue, of the
        query tiles that visit key tile ``m`` of residue ``r`` of head ``h``, ascending.
        """
        queries, keys = self.shape[0] // self.residues, self.shape[1]
        row = self.rows()
        column = row // queries * keys + self.keys
        column, order = column.sort(stable=True)
        wanted = torch.arange(self.heads * self.residues * keys + 1, device=column.device)
        offsets = torch.searchsorted(column, wanted.int(), out_int32=True)
        number = (row % queries)[order]
        shape, tile = (self.residues * keys, queries), self.tile[::-1]
        return TileList(offsets, number, self.full[order], shape, tile, self.residues)


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
    """List the tiles with at least one visible cell, in time and memory of the listed tiles.

    Args:
        pattern: a ``Pattern``.
        q_order, k_order: how queries and keys are stored: residues of both meet one to one, or one
            residue of keys meets all residues of queries.
        queries, keys: tokens of the sequence that there are.
        tile: tokens of a tile of (queries, keys).
        heads: number of heads; the list has one if they are alike.
        device: where to compute the list.

    Raises:
        ValueError: if a size is not positive, or is 2**31 or more, or the residues do not fit.
    """
    _check(queries=queries, keys=keys, tile=min(tile), heads=heads)
    if k_order.residues not in (1, q_order.residues):
        raise ValueError(
            f"keys must have one residue or as many as the queries, "
            f"got {k_order.residues} and {q_order.residues}."
        )
    pattern = pattern.bound()
    numbers = tuple(range(heads)) if pattern.differs_by_head else (0,)
    return _list(
        pattern, Grid(q_order, k_order, queries, keys, tile, numbers, torch.device(device))
    )


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if not 1 <= size <= LARGEST:
            raise ValueError(f"{name} must be at least 1 and below 2**31, got {name}={size}.")


def _list(pattern, grid: Grid) -> TileList:
    """The tiles that a bound pattern visits."""
    runs = find(pattern, grid)
    count = torch.zeros(grid.planes * grid.rows + 1, dtype=torch.int64, device=grid.device)
    offsets = count.index_add_(0, runs.row + 1, runs.width).cumsum(0)
    run = torch.repeat_interleave(runs.width)
    within = torch.arange(len(run), device=run.device) - (runs.width.cumsum(0) - runs.width)[run]
    shape = (grid.residues * grid.rows, grid.columns)
    keys = (runs.first[run] + within).int()
    return TileList(offsets.int(), keys, runs.full[run], shape, grid.tile, grid.residues)


def last_visitor(pattern, head: int, length: int, queries: int) -> Tensor:
    """The last tile of ``queries`` queries in which each key is seen, ``(length)``; -1 for none.

    Of a bound pattern.
    """
    device = torch.device("cpu")
    grid = Grid(SEQUENCE, SEQUENCE, length, length, (queries, 1), (head,), device)
    tiles = _list(pattern, grid)
    last = torch.full((length,), -1)
    return last.scatter_reduce_(0, tiles.keys.long(), tiles.rows().long(), "amax")


def count_cells(pattern, length: int, heads: int) -> int:
    """Visible cells of ``heads`` heads over ``length`` queries and keys, counted exactly.

    Each part of the pattern is counted in the order of tokens in which it is dense. Of a tile that
    is seen whole no cell is looked at.
    """
    _check(length=length, heads=heads)
    pattern = pattern.bound()
    heads_of: dict[Pattern, list[int]] = {}
    for head in range(heads):
        for part in _disjoint(pattern.of_head(head)):
            heads_of.setdefault(part, []).append(head)
    return sum(_count(part, length, own) for part, own in heads_of.items())


def _disjoint(pattern: Pattern) -> list[Pattern]:
    """Parts of a pattern that have no cell in common, those with an order of their own first."""
    own = [part for part in pattern.alternatives if part.order != Pattern.order]
    if not own:
        return [pattern]
    rest = [part for part in pattern.alternatives if part.order == Pattern.order]
    parts = own + ([functools.reduce(operator.or_, rest)] if rest else [])
    return [
        functools.reduce(operator.and_, map(Not, own[:n]), part) for n, part in enumerate(parts)
    ]


def _count(pattern: Pattern, length: int, heads: list[int]) -> int:
    """Visible cells of some heads of a bound pattern, none of which its order leaves out."""
    numbers = tuple(heads if pattern.differs_by_head else heads[:1])
    device = torch.device("cpu")
    grid = Grid(*pattern.order, length, length, (_COUNTED, _COUNTED), numbers, device)
    runs = find(pattern, grid)
    plane, row = runs.row // grid.rows, runs.row % grid.rows
    queries, keys = grid.tokens(plane)
    queries = (queries - row * _COUNTED).clamp(max=_COUNTED)
    keys = (keys - runs.first * _COUNTED).minimum(runs.width * _COUNTED)
    cells = int((queries * keys)[runs.full].sum())
    partial = torch.stack([plane, row, runs.first])[:, ~runs.full]
    for _, seen, exists in look(pattern, grid, partial):
        cells += int((seen & exists).sum())
    return cells * (len(heads) // len(numbers))
