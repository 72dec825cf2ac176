"""``leading_queries(n)``: the leading tokens see all."""

from dataclasses import dataclass

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import Pattern
from kernels.patterns.parsing import at_least, constructor


@constructor
def leading_queries(count: int) -> Pattern:
    """Visible when ``i < count``: the rows of global tokens, whose columns are ``sinks(count)``."""
    at_least(1, f"leading_queries({count})", count=count)
    return LeadingQueries(count)


@dataclass(frozen=True)
class LeadingQueries(Pattern):
    count: int
    past_seen_up_to = future_seen_up_to = property(lambda self: self.count)
    numbers = property(lambda self: (self.count,))

    def _visible(self, i, j, head, length):
        return (i < self.count).expand_as(i + j)

    def _known(self, box):
        return box.exact(box.i_low < self.count, box.i_high < self.count)

    @staticmethod
    @device_function
    def rule(i, j, count):
        return (i < count) & (j == j)

    def __repr__(self) -> str:
        return f"leading_queries({self.count})"
