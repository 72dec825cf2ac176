"""Storage orders: in which order a pass over a pattern takes the tokens, which stay where they are.

Each term says in which order it is dense (`Pattern.order`): `strided` and `dilated` among the
tokens of a residue class, `summary` (and so `fixed`) among the gathered summary cells, and all
others in the sequence itself. `kernels/attend/passes.py` cuts a pattern accordingly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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


SEQUENCE = Order()
MOST_RESIDUES = 2**16  # a class of more would have too few tokens to fill a tile


def residue_classes(step: int) -> tuple[Order, Order]:
    """Queries and keys by their residue modulo ``step``; with too many residues, as they stand."""
    return (Order(step=step, residues=step) if step <= MOST_RESIDUES else SEQUENCE,) * 2
