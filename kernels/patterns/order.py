"""Storage orders: in which order a pass over a pattern takes the tokens, which stay where they are.

Each term says in which order it is dense (`Pattern.order`): `strided` and `dilated` among the
tokens of a residue class, `summary` (and so `fixed`) among the gathered summary cells, `global_at`
among its listed tokens, and all others in the sequence itself. `kernels/attend/passes.py` cuts a
pattern accordingly.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common.kept import kept


@dataclass(frozen=True)
class Order:
    """Where the token with index ``n`` of residue ``r`` stands in the sequence.

    At ``(n // run) * step + first + r + n % run``. ``Order()`` is the sequence itself,
    ``Order(step=l, residues=l)`` its residue classes modulo ``l``, one after the other, and
    ``Order(run=c, step=l, first=f)`` the ``c`` tokens from number ``f`` of every block of ``l``.
    """

    run: int = 1
    step: int = 1
    first: int = 0
    residues: int = 1

    @property
    def has_all(self) -> bool:
        """Whether every token of the sequence is in it."""
        return self.residues == self.step

    @property
    def spacing(self) -> int | None:
        """The distance of neighbours, if it is the same everywhere; else None."""
        return self.step if self.run == 1 else None

    def position(self, residue: Tensor | int, index: Tensor) -> Tensor:
        """The position in the sequence."""
        if self.run == 1:
            return index * self.step + (residue + self.first)
        return index // self.run * self.step + index % self.run + (residue + self.first)

    def count(self, residue: Tensor | int, length: int) -> Tensor:
        """How many tokens of a residue stand before position ``length``."""
        rest = (length - self.first - torch.as_tensor(residue)).clamp(min=0)
        return rest // self.step * self.run + (rest % self.step).clamp(max=self.run)

    def longest(self, length: int) -> int:
        """Tokens of the longest residue, the first one, before position ``length``."""
        return int(self.count(0, length))


@dataclass(frozen=True)
class Listed(Order):
    """Some tokens, gathered: the one with index ``n`` stands at ``positions[n]``, ascending."""

    positions: tuple[int, ...] = ()

    has_all = False
    spacing = None

    def position(self, residue: Tensor | int, index: Tensor) -> Tensor:
        """The position in the sequence; past the last index one that no sequence has."""
        table = _tensor(self.positions, index.device)
        return table[index.clamp(max=len(self.positions))]

    def count(self, residue: Tensor | int, length: int) -> Tensor:
        """How many tokens stand before position ``length``."""
        before = bisect_left(self.positions, length)
        return torch.full_like(torch.as_tensor(residue), before, dtype=torch.int64)


@kept(maxsize=64)
def _tensor(positions: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([*positions, _BEYOND], device=device)


SEQUENCE = Order()
_BEYOND = 2**40  # a position that no sequence has
MOST_RESIDUES = 2**16  # a class of more would have too few tokens to fill a tile


def residue_classes(step: int) -> tuple[Order, Order]:
    """Queries and keys by their residue modulo ``step``; with too many residues, as they stand."""
    return (Order(step=step, residues=step) if step <= MOST_RESIDUES else SEQUENCE,) * 2
