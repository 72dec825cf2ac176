"""The grid of tiles that queries and keys make, each stored in an order of its own."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.patterns.bounds import Box
from kernels.patterns.order import Order

_FIRST_BOXES = 2**14  # that cover the grid at most, if one box a plane does not do


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
        heads = self._heads
        return heads[plane // self.residues] if len(heads) > 1 else heads[0]

    @functools.cached_property
    def _heads(self) -> Tensor:
        return torch.tensor(self.heads, device=self.device)

    @staticmethod
    def _range(order: Order, residue: Tensor, length: int, number: Tensor, side: int):
        """First and last position of a range of ``side`` tokens."""
        if order == Order():
            first = number * side
            return first, (first + (side - 1)).clamp(max=length - 1)
        residue = residue if order.residues > 1 else 0
        last = ((number + 1) * side).clamp(max=order.count(residue, length)) - 1
        return order.position(residue, number * side), order.position(residue, last)

    def quarters(self, place: Tensor, side: int) -> Tensor:
        """The quarters of boxes at ``place (3, N)``, without those that hold no token."""
        scale, step = self._quarter
        place = ((place * scale)[:, :, None] + step).flatten(1)
        return place[:, self.exist(place, side // 2).nonzero()[:, 0]]

    @functools.cached_property
    def _quarter(self) -> tuple[Tensor, Tensor]:
        """Factors ``(3, 1)`` of a place, and what its four quarters add to it, ``(3, 1, 4)``."""
        step = [[[0, 0, 0, 0]], [[0, 0, 1, 1]], [[0, 1, 0, 1]]]
        return (
            torch.tensor([[1], [2], [2]], device=self.device),
            torch.tensor(step, device=self.device),
        )

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
        queries, keys = self.tokens(torch.arange(self.residues, device=self.device))
        return -(-queries // self.tile[0]), -(-keys // self.tile[1])

    def tokens(self, plane: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of each plane."""
        residue = plane % self.residues
        k_residue = residue if self.k_order.residues > 1 else torch.zeros_like(residue)
        return self.q_order.count(residue, self.queries), self.k_order.count(k_residue, self.keys)
