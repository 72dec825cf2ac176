"""``sinks(n)``: the leading keys are seen by all."""

from dataclasses import dataclass

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import Pattern
from kernels.patterns.parsing import at_least, constructor


@constructor
def sinks(count: int) -> Pattern:
    """Visible when ``j < count``: attention sinks (Xiao et al. 2023, arXiv:2309.17453)."""
    at_least(1, f"sinks({count})", count=count)
    return Sinks(count)


@dataclass(frozen=True)
class Sinks(Pattern):
    count: int
    past_seen_up_to = future_seen_up_to = property(lambda self: self.count)
    numbers = property(lambda self: (self.count,))

    def _visible(self, i, j, head, length):
        return (j < self.count).expand_as(i + j)

    def _known(self, box):
        return box.exact(box.j_low < self.count, box.j_high < self.count)

    @staticmethod
    @device_function
    def rule(i, j, count):
        return (i == i) & (j < count)

    def __repr__(self) -> str:
        return f"sinks({self.count})"
