"""``others()``: every key but the query's own position."""

from dataclasses import dataclass

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import Pattern
from kernels.patterns.parsing import constructor


@constructor
def others() -> Pattern:
    """Visible when ``i != j``."""
    return Others()


@dataclass(frozen=True, repr=False)
class Others(Pattern):
    knows_distance_only = True

    def _visible(self, i, j, head, length):
        return i != j

    def _known(self, box):
        return ~box.band(0, 0)

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        return i != j

    def __repr__(self) -> str:
        return "others()"
