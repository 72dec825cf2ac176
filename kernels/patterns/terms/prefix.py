"""``prefix(n)``: the leading tokens see each other both ways, the rest is causal."""

from dataclasses import dataclass

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import ANY_LENGTH, Pattern
from kernels.patterns.parsing import at_least, constructor


@constructor
def prefix(count: int) -> Pattern:
    """Visible when ``j <= i`` or ``j < count``: a prefix language model (arXiv:1910.10683)."""
    at_least(1, f"prefix({count})", count=count)
    return Prefix(count)


@dataclass(frozen=True)
class Prefix(Pattern):
    count: int
    sees_itself = True
    past_seen_up_to = ANY_LENGTH
    future_seen_up_to = property(lambda self: self.count)
    numbers = property(lambda self: (self.count,))

    def _visible(self, i, j, head, length):
        return (j <= i) | (j < self.count)

    def _known(self, box):
        some = (box.j_low <= box.i_high) | (box.j_low < self.count)
        return box.exact(some, (box.j_high <= box.i_low) | (box.j_high < self.count))

    @staticmethod
    @device_function
    def rule(i, j, count):
        return (j <= i) | (j < count)

    def __repr__(self) -> str:
        return f"prefix({self.count})"
