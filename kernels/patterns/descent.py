"""Which tiles of a grid hold a visible cell, found from large boxes of tiles down to single ones.

A few large boxes cover the grid. Of each the pattern says, by formula, what is certain: if nothing
is visible the box is dropped, if everything is it is kept whole, and else it is cut into four,
until single tiles are left. So only boxes along the borders of a pattern are ever cut, and the time
grows with the tiles that are visited, not with the square of the length. What no formula decides
about a single tile, a look at its cells does.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.patterns.bounds import Box, Known
from kernels.patterns.order import Order

_FIRST_BOXES = 2**14  # that cover the grid at most, if one box a plane does not do
_CELLS = 2**18  # looked at at once: 1 MiB for each int32 temporary, which stays in a CPU's cache


@dataclass(frozen=True, eq=False)
class Grid:
    """The tiles of queries and keys, each stored in an order of its own.

    A *plane* is the tiles of one residue in one head: number ``head index * residues + residue``.
    The residues of both orders meet one to one, or keys of one residue meet all queries.

    Args:
        q_order, k_order: how queries and keys are stored.
        queries, keys: tokens of the sequence that there are.
        tile: tokens of a tile of (queries, keys).
        heads: numbers of the heads.
        device: where tiles are found.
    """

    q_order: Order
    k_order: Order
    queries: int
    keys: int
    tile: tuple[int, int]
    heads: tuple[int, ...]
    device: torch.device

    @property
    def residues(self) -> int:
        return self.q_order.residues

    @property
    def planes(self) -> int:
        return len(self.heads) * self.residues

    @functools.cached_property
    def rows(self) -> int:
        """Tiles of queries of a plane."""
        return -(-self.q_order.longest(self.queries) // self.tile[0])

    @functools.cached_property
    def columns(self) -> int:
        """Tiles of keys of a plane."""
        return -(-self.k_order.longest(self.keys) // self.tile[1])

    def cover(self) -> tuple[Tensor, int]:
        """The first boxes, and how many tiles they have on a side."""
        side = 1 << max(self.rows - 1, self.columns - 1, 0).bit_length()
        while side > 1 and self.planes * self._boxes(side // 2) <= _FIRST_BOXES:
            side //= 2
        sizes = self.planes, -(-self.rows // side), -(-self.columns // side)
        numbers = [torch.arange(size, device=self.device) for size in sizes]
        return torch.cartesian_prod(*numbers).T, side

    def _boxes(self, side: int) -> int:
        return -(-self.rows // side) * -(-self.columns // side)

    def number(self, place: Tensor) -> Tensor:
        """One number for each tile at ``place (3, N)``: they ascend plane by plane, row by row."""
        return (place[0] * self.rows + place[1]) * self.columns + place[2]

    def place(self, number: Tensor) -> Tensor:
        """Plane, row and column ``(3, N)`` of tiles by their number."""
        row = number // self.columns
        return torch.stack([row // self.rows, row % self.rows, number % self.columns])

    def box(self, place: Tensor, side: int) -> Box:
        """The cells of boxes of ``side x side`` tiles at ``place (3, N)``: plane, row, column.

        Every box has a tile with a token at its top left.
        """
        plane, row, column = place
        residue = plane % self.residues if self.residues > 1 else 0
        return Box(
            *self._range(self.q_order, residue, self.queries, row, side * self.tile[0]),
            *self._range(self.k_order, residue, self.keys, column, side * self.tile[1]),
            head=self.head(plane),
            sides=(side * self.tile[0], side * self.tile[1]),
            q_order=self.q_order,
            k_order=self.k_order,
            queries=self.queries,
            keys=self.keys,
        )

    def head(self, plane: Tensor) -> Tensor:
        """The number of the head of each plane, or one number for all, ``()``."""
        heads = torch.tensor(self.heads, device=self.device)
        return heads[plane // self.residues] if len(heads) > 1 else heads[0]

    @staticmethod
    def _range(order: Order, residue: Tensor, length: int, number: Tensor, side: int):
        """First and last position of a range of ``side`` tokens."""
        if order == Order():
            first = number * side
            return first, (first + (side - 1)).clamp(max=length - 1)
        residue = residue if order.residues > 1 else 0
        last = ((number + 1) * side).clamp(max=order.count(residue, length)) - 1
        return order.position(residue, number * side), order.position(residue, last)

    def parts(self, place: Tensor, side: int) -> Tensor:
        """The boxes of half the side in boxes at ``place (3, N)``; those without tokens are not."""
        step = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]], device=self.device)
        twice = torch.tensor([[1], [2], [2]], device=self.device)
        place = ((place * twice)[:, :, None] + step[:, None]).flatten(1)
        return place[:, self.exist(place, side // 2).nonzero()[:, 0]]

    def exist(self, place: Tensor, side: int) -> Tensor:
        """Whether boxes hold a token."""
        rows, columns = self.extent(place[0])
        return (place[1] * side < rows) & (place[2] * side < columns)

    def extent(self, plane: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles of queries and of keys that hold a token: of each plane, or ``()`` of all alike."""
        if self.residues == 1:
            return self._tiles_of_residue[0][0], self._tiles_of_residue[1][0]
        residue = plane % self.residues
        return self._tiles_of_residue[0][residue], self._tiles_of_residue[1][residue]

    @functools.cached_property
    def _tiles_of_residue(self) -> tuple[Tensor, Tensor]:
        residue = torch.arange(self.residues, device=self.device)
        k_residue = residue if self.k_order.residues > 1 else torch.zeros_like(residue)
        rows = -(-self.q_order.count(residue, self.queries) // self.tile[0])
        return rows, -(-self.k_order.count(k_residue, self.keys) // self.tile[1])


@dataclass(frozen=True, eq=False)
class Runs:
    """Neighbouring tiles of rows.

    Row ``plane * rows of the grid + n`` is tile ``n`` of the queries of a plane. Runs that are not
    full are single tiles.

    Args:
        row, first, width: row, first column and number of the tiles, ``(N,)`` int64 each.
        full: whether every cell is visible, ``(N,)`` bool.
    """

    row: Tensor
    first: Tensor
    width: Tensor
    full: Tensor

    @classmethod
    def joined(cls, parts: "list[Runs]", columns: int) -> "Runs":
        """All runs in ascending order of their tiles, of which a row has ``columns``."""
        row, first, width, full = (
            torch.cat(fields)
            for fields in zip(*((p.row, p.first, p.width, p.full) for p in parts), strict=True)
        )
        order = (row * columns + first).argsort()
        return cls(row[order], first[order], width[order], full[order])

    def without(self, tile: Tensor, columns: int) -> "Runs":
        """Sorted runs, less some tiles ``row * columns + column``, ascending, which cut them."""
        if not len(self.row):
            return self
        start = self.row * columns + self.first
        run = torch.searchsorted(start, tile, right=True) - 1
        inside = (run >= 0) & (tile < (start + self.width)[run.clamp(min=0)])
        tile = tile[inside]
        first = torch.cat([start, tile + 1]).sort().values
        end = torch.cat([tile, start + self.width]).sort().values
        left = first < end
        first, end = first[left], end[left]
        full = self.full[torch.searchsorted(start, first, right=True) - 1]
        return Runs(first // columns, first % columns, end - first, full)


@dataclass(frozen=True, eq=False)
class Found:
    """What a descent leaves: whole boxes, and single tiles at the borders.

    Args:
        grid: what it went through.
        whole: side in tiles, places ``(3, N)`` and number ``(N,)`` of neighbouring boxes in a row
            of which every cell is visible.
        single: places ``(3, N)`` of tiles of which that is not so.
        sure: whether it is certain that such a tile has a visible cell, ``(N,)`` bool.
    """

    grid: Grid
    whole: list[tuple[int, Tensor, Tensor]]
    single: Tensor
    sure: Tensor

    def runs(self, live: Tensor, full: Tensor) -> Runs:
        """All tiles of whole boxes, and the ``live (N,)`` single ones.

        ``full (N,)`` says of which single tiles every cell is visible after all.
        """
        grid = self.grid
        plane, row, column = self.single[:, live]
        parts = [Runs(plane * grid.rows + row, column, torch.ones_like(row), full[live])]
        for side, (plane, row, column), count in self.whole:
            rows, columns = grid.extent(plane)
            height = (rows - row * side).clamp(max=side)
            width = (columns - column * side).minimum(count * side)
            box = torch.repeat_interleave(height)
            within = torch.arange(len(box), device=box.device) - (height.cumsum(0) - height)[box]
            row = plane[box] * grid.rows + row[box] * side + within
            yes = torch.ones_like(row, dtype=torch.bool)
            parts.append(Runs(row, column[box] * side, width[box], yes))
        return Runs.joined(parts, grid.columns)


def descend(grid: Grid, known: Callable[[Box], Known]) -> Found:
    """Go through the boxes of ``grid``, given what is certain of each."""
    place, side = grid.cover()
    place = place[:, grid.exist(place, side)]
    whole = []
    while True:
        about = known(grid.box(place, side))
        whole.append((side, *_neighbours(place[:, about.every.nonzero()[:, 0]])))
        rest = (~(about.every | about.none)).nonzero()[:, 0]
        place = place[:, rest]
        if side == 1:
            return Found(grid, whole, place, about.some[rest])
        place, side = grid.parts(place, side), side // 2


def _neighbours(place: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each chain of boxes that follow one another in a row, and how many these are."""
    follows = place.diff(dim=1) == torch.tensor([[0], [0], [1]], device=place.device)
    starts = torch.ones_like(place[0], dtype=torch.bool)
    starts[1:] = ~follows.all(dim=0)
    first = starts.nonzero()[:, 0]
    end = torch.cat([first[1:], first.new_full((len(first[:1]),), place.shape[1])])
    return place[:, first], end - first


def find(pattern, grid: Grid) -> Runs:
    """The tiles of ``grid`` in which a bound pattern shows a cell, ascending."""
    scattered = pattern._scattered(grid)
    if scattered is None:
        found = descend(grid, pattern._known)
        return found.runs(*_settled(pattern, grid, found.single, found.sure))
    # Random blocks would keep nearly every large box from being dropped. Outside of the tiles that
    # they touch, the pattern is what it is without them; those tiles are asked one by one.
    number, rest = scattered
    place, columns = grid.place(number), grid.columns
    runs = _of_all_heads(rest, grid).without(number, columns)
    about = pattern._known(grid.box(place, 1))
    some, every = _settled(pattern, grid, place, about.some | about.none)
    live = torch.where(about.none, False, some)
    full = (every | about.every)[live]
    plane, row, column = place[:, live]
    touched = Runs(plane * grid.rows + row, column, torch.ones_like(row), full)
    return Runs.joined([runs, touched], columns)


def _of_all_heads(pattern, grid: Grid) -> Runs:
    """The tiles of a pattern whose heads may be alike, for every head of ``grid``."""
    if pattern.differs_by_head:
        return find(pattern, grid)
    one = find(pattern, replace(grid, heads=grid.heads[:1]))
    heads = torch.arange(len(grid.heads), device=grid.device)[:, None] * grid.residues * grid.rows
    row = (heads + one.row).flatten()
    return Runs(row, *(field.repeat(len(grid.heads)) for field in (one.first, one.width, one.full)))


def look(pattern, grid: Grid, place: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The cells of tiles at ``place (3, N)``, some tiles at a time.

    Yields:
        Which cells are visible to a bound pattern, and which exist, ``(tiles, *tile)`` each.
    """
    index = [torch.arange(size, device=grid.device) for size in grid.tile]
    heads = torch.tensor(grid.heads, device=grid.device)
    for part in place.split(max(1, _CELLS // (grid.tile[0] * grid.tile[1])), dim=1):
        if not part.numel():
            return
        plane, row, column = part[:, :, None]
        residue = plane % grid.residues
        k_residue = residue if grid.k_order.residues > 1 else 0
        i = grid.q_order.position(residue, row * grid.tile[0] + index[0])
        j = grid.k_order.position(k_residue, column * grid.tile[1] + index[1])
        i, j = i.int()[:, :, None], j.int()[:, None, :]
        exists = (i < grid.queries) & (j < grid.keys)
        head = heads[plane // grid.residues][:, :, None] if len(heads) > 1 else grid.heads[0]
        # A position that does not exist has no row in a table: any that exists will do.
        i, j = i.clamp(max=grid.queries - 1), j.clamp(max=grid.keys - 1)
        length = max(grid.queries, grid.keys)
        yield pattern._visible(i, j, head, length).expand_as(exists), exists


def settle(pattern, grid: Grid, place: Tensor) -> tuple[Tensor, Tensor]:
    """Whether some cell, and whether every cell of tiles at ``place (3, N)`` is visible."""
    some = [torch.zeros(0, dtype=torch.bool, device=grid.device)]
    every = list(some)
    for seen, exists in look(pattern, grid, place):
        some.append((seen & exists).flatten(1).any(dim=1))
        every.append((seen | ~exists).flatten(1).all(dim=1))
    return torch.cat(some), torch.cat(every)


def _settled(pattern, grid: Grid, place: Tensor, sure: Tensor) -> tuple[Tensor, Tensor]:
    """Whether tiles at ``place (3, N)`` are live, and full; what is not sure is looked at."""
    doubtful = (~sure).nonzero()[:, 0]
    live, full = sure.clone(), torch.zeros_like(sure)
    live[doubtful], full[doubtful] = settle(pattern, grid, place[:, doubtful])
    return live, full
