"""``strided(l)``: columns, one every ``l`` keys, counted from the query."""

from dataclasses import dataclass

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import Pattern
from kernels.patterns.order import residue_classes
from kernels.patterns.parsing import at_least, constructor


@constructor
def strided(stride: int) -> Pattern:
    """Visible when ``i - j`` is a multiple of ``stride``: the column part alone.

    The pattern of the paper is ``causal() & (window(l) | strided(l))``, here with ``l`` keys in
    the window as in the released code; the text of the paper has ``l + 1``.

    Raises:
        ValueError: if ``stride`` is not positive.

    Source:
        Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    at_least(1, f"strided({stride})", stride=stride)
    return Strided(stride)


@dataclass(frozen=True, repr=False)
class Strided(Pattern):
    stride: int

    sees_itself = knows_distance_only = True

    @property
    def order(self):
        return residue_classes(self.stride)

    def _visible(self, i, j, head, length):
        return (i - j) % self.stride == 0

    def _known(self, box):
        return box.band(None, box.length, self.stride)

    @property
    def numbers(self) -> tuple[int]:
        return (self.stride,)

    @staticmethod
    @device_function
    def rule(i, j, stride):
        return (i - j) % stride == 0

    def __repr__(self) -> str:
        return f"strided({self.stride})"
