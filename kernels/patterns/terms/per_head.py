"""``per_head(p, q, ...)``: heads see patterns of their own, in turn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.patterns.algebra import Pattern
from kernels.patterns.bounds import Known
from kernels.patterns.parsing import constructor


@constructor
def per_head(*patterns: Pattern) -> Pattern:
    """Head ``h`` sees ``patterns[h % len(patterns)]``.

    Raises:
        ValueError: if there is no pattern.
        TypeError: if one of them is something else.
    """
    if not patterns:
        raise ValueError("per_head needs at least one pattern, got none.")
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"per_head takes patterns, got {pattern!r}")
    return PerHead(patterns)


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    operands: tuple[Pattern, ...]

    @property
    def differs_by_head(self) -> bool:
        return len(set(self.operands)) > 1 or self.operands[0].differs_by_head

    @property
    def variants(self) -> int:
        return max(len(self.operands), *(pattern.variants for pattern in self.operands))

    @property
    def is_causal(self) -> bool:
        return all(pattern.is_causal for pattern in self.operands)

    @property
    def sees_itself(self) -> bool:
        return all(pattern.sees_itself for pattern in self.operands)

    @property
    def knows_distance_only(self) -> bool:
        return all(pattern.knows_distance_only for pattern in self.operands)

    def of_head(self, head):
        return self.operands[head % len(self.operands)].of_head(head)

    def _visible(self, i, j, head, length):
        if not isinstance(head, Tensor):
            return self.operands[head % len(self.operands)]._visible(i, j, head, length)
        number = head.to(i.device) % len(self.operands)
        seen = self.operands[0]._visible(i, j, head, length)
        for n, pattern in enumerate(self.operands[1:], start=1):
            seen = torch.where(number == n, pattern._visible(i, j, head, length), seen)
        return seen

    def _known(self, box):
        known = torch.zeros(4, len(box.i_low), dtype=torch.bool, device=box.head.device)
        for n, pattern in enumerate(self.operands):
            own = (box.head.expand_as(box.i_low) % len(self.operands) == n).nonzero()[:, 0]
            part = pattern._known(box.of(own))
            known[:, own] = torch.stack([part.some, part.every, part.gap, part.none])
        return Known(*known)

    def __repr__(self) -> str:
        return f"per_head({', '.join(map(repr, self.operands))})"
