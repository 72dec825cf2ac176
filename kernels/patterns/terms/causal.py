"""``causal()``: no key that comes after the query."""

from dataclasses import dataclass

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import ANY_LENGTH, Pattern
from kernels.patterns.parsing import constructor


@constructor
def causal() -> Pattern:
    """Visible when ``j <= i``."""
    return Causal()


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    is_causal = sees_itself = knows_distance_only = True
    past_seen_up_to = ANY_LENGTH

    def _visible(self, i, j, head, length):
        return j <= i

    def _known(self, box):
        return box.band(None, 0)

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        return j <= i

    def __repr__(self) -> str:
        return "causal()"
