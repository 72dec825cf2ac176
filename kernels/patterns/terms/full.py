"""``full()``: no key is hidden."""

from dataclasses import dataclass

import torch

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import ANY_LENGTH, Pattern
from kernels.patterns.parsing import constructor


@constructor
def full() -> Pattern:
    """Always visible."""
    return Full()


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    sees_itself = knows_distance_only = True
    past_seen_up_to = future_seen_up_to = ANY_LENGTH

    def _visible(self, i, j, head, length):
        return torch.ones_like(i + j, dtype=torch.bool)

    def _known(self, box):
        return box.constant(True)

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        return (i == i) & (j == j)

    def __repr__(self) -> str:
        return "full()"
