"""``global_tokens(g)``: the leading tokens see all and are seen by all."""

from dataclasses import dataclass

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import Pattern
from kernels.patterns.parsing import at_least, constructor


@constructor
def global_tokens(count: int) -> Pattern:
    """Visible when ``i < count`` or ``j < count``: the first tokens see all and are seen by all.

    Raises:
        ValueError: if ``count`` is not positive.
    """
    at_least(1, f"global_tokens({count})", count=count)
    return GlobalTokens(count)


@dataclass(frozen=True, repr=False)
class GlobalTokens(Pattern):
    count: int

    @property
    def past_seen_up_to(self) -> int:
        return self.count

    future_seen_up_to = past_seen_up_to

    def _visible(self, i, j, head, length):
        return (i < self.count) | (j < self.count)

    def _known(self, box):
        some = (box.i_low < self.count) | (box.j_low < self.count)
        return box.exact(some, (box.i_high < self.count) | (box.j_high < self.count))

    @property
    def numbers(self) -> tuple[int]:
        return (self.count,)

    @staticmethod
    @device_function
    def rule(i, j, count):
        return (i < count) | (j < count)

    def __repr__(self) -> str:
        return f"global_tokens({self.count})"
