"""Neighbouring tiles of a row as one entry: what a pattern shows, in few numbers at any length."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
