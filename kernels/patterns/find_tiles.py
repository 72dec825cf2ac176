"""Which tiles of keys a tile of queries visits: found from large boxes down to single tiles.

A few large boxes cover the grid. Of each the pattern says, by formula, what is certain: if nothing
is visible the box is dropped, if everything is it is kept whole, and else it is cut into four,
until single tiles are left. So only boxes along the borders of a pattern are ever cut, and the time
grows with the tiles that are visited, not with the square of the length. What no formula decides
about a single tile, a look at its cells does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.patterns.bounds import Box, Known
from kernels.patterns.grid import Grid
from kernels.patterns.runs import Runs

CELLS = 2**18  # looked at at once: 1 MiB for each int32 temporary, which stays in a CPU's cache


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
        if (every := about.every.nonzero()[:, 0]).numel():
            whole.append((side, *_neighbours(place[:, every])))
        rest = (~(about.every | about.none)).nonzero()[:, 0]
        place = place[:, rest]
        if side == 1:
            return Found(grid, whole, place, about.some[rest])
        place, side = grid.quarters(place, side), side // 2


def _neighbours(place: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each chain of boxes that follow one another in a row, and how many these are."""
    plane, row, column = place.diff(dim=1)
    starts = torch.ones_like(place[0], dtype=torch.bool)
    starts[1:] = (plane != 0) | (row != 0) | (column != 1)
    first = starts.nonzero()[:, 0]
    end = torch.cat([first[1:], first.new_full((len(first[:1]),), place.shape[1])])
    return place[:, first], end - first


def find(pattern, grid: Grid) -> Runs:
    """The tiles of ``grid`` in which a bound pattern shows a cell, ascending."""
    scattered = pattern._scattered(grid)
    if scattered is None:
        found = descend(grid, pattern._known)
        never = torch.zeros_like(found.sure)
        return found.runs(*decide(pattern, grid, found.single, found.sure, never, never))
    # Random blocks would keep nearly every large box from being dropped. Outside of the tiles that
    # they touch, the pattern is what it is without them; those tiles are asked one by one.
    number, rest = scattered
    place, columns = grid.place(number), grid.columns
    runs = _of_all_heads(rest, grid).without(number, columns)
    about = pattern._known(grid.box(place, 1))
    live, full = decide(pattern, grid, place, about.some, about.every, about.none)
    plane, row, column = place[:, live]
    touched = Runs(plane * grid.rows + row, column, torch.ones_like(row), full[live])
    return Runs.joined([runs, touched], columns)


def decide(
    pattern, grid: Grid, place: Tensor, some: Tensor, every: Tensor, none: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether tiles at ``place (3, N)`` are live, and full, given what is certain, ``(N,)`` each.

    What no formula decides is looked at.
    """
    live, full = some.clone(), every.clone()
    doubtful = (~(some | none)).nonzero()[:, 0]
    live[doubtful], full[doubtful] = look_whether(pattern, grid, place[:, doubtful])
    return live, full


def _of_all_heads(pattern, grid: Grid) -> Runs:
    """The tiles of a pattern whose heads may be alike, for every head of ``grid``."""
    if pattern.differs_by_head:
        return find(pattern, grid)
    one = find(pattern, replace(grid, heads=grid.heads[:1]))
    heads = torch.arange(len(grid.heads), device=grid.device)[:, None] * grid.residues * grid.rows
    row = (heads + one.row).flatten()
    return Runs(row, *(field.repeat(len(grid.heads)) for field in (one.first, one.width, one.full)))


def look(pattern, grid: Grid, place: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The cells of tiles at ``place (3, N)``: some tiles at a time, of large ones some rows.

    Yields:
        Which of the tiles these are, and which of their cells are visible to a bound pattern, and
        which exist, ``(tiles, rows, columns)`` each.
    """
    index = [torch.arange(size, device=grid.device) for size in grid.tile]
    heads = torch.tensor(grid.heads, device=grid.device)
    rows = min(grid.tile[0], max(1, CELLS // grid.tile[1]))
    tiles = max(1, CELLS // (rows * grid.tile[1]))
    for first in range(0, place.shape[1], tiles):
        chosen = slice(first, first + tiles)
        plane, row, column = place[:, chosen, None]
        residue = plane % grid.residues
        k_residue = residue if grid.k_order.residues > 1 else 0
        head = heads[plane // grid.residues][:, :, None] if len(heads) > 1 else grid.heads[0]
        j = grid.k_order.position(k_residue, column * grid.tile[1] + index[1])[:, None, :]
        for within in index[0].split(rows):
            i = grid.q_order.position(residue, row * grid.tile[0] + within)[:, :, None]
            exists = (i < grid.queries) & (j < grid.keys)
            # A position that does not exist has no row in a table: any that exists will do.
            cell = i.clamp(max=grid.queries - 1).int(), j.clamp(max=grid.keys - 1).int()
            seen = pattern._visible(*cell, head, max(grid.queries, grid.keys))
            yield chosen, seen.expand_as(exists), exists


def look_whether(pattern, grid: Grid, place: Tensor) -> tuple[Tensor, Tensor]:
    """Whether some cell, and whether every cell of tiles at ``place (3, N)`` is visible."""
    some = torch.zeros(place.shape[1], dtype=torch.bool, device=grid.device)
    every = ~some
    for tiles, seen, exists in look(pattern, grid, place):
        some[tiles] |= (seen & exists).flatten(1).any(dim=1)
        every[tiles] &= (seen | ~exists).flatten(1).all(dim=1)
    return some, every
