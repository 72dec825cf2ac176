"""``dilated(w, d)``: a window with gaps."""

from dataclasses import dataclass

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import LARGEST, Pattern
from kernels.patterns.order import residue_classes
from kernels.patterns.parsing import at_least, constructor


@constructor
def dilated(left: int, right: int, step: int | None = None) -> Pattern:
    """A window with gaps: every ``step``-th key.

    ``dilated(w, d)``: ``i - j`` is one of ``0, d, 2 d, ... (w - 1) d``.
    ``dilated(left, right, d)``: ``j = i + m d`` with ``-left <= m <= right``.

    Raises:
        ValueError: if a size is negative, the step 0, or ``dilated(w, d)`` would see nothing.

    Source:
        Longformer, Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
    """
    if step is None:
        at_least(1, f"dilated({left}, {right})", keys=left, step=right)
        return Dilated(left - 1, 0, right)
    given = f"dilated({left}, {right}, {step})"
    at_least(0, given, left=left, right=right)
    at_least(1, given, step=step)
    return Dilated(left, right, step)


@dataclass(frozen=True, repr=False)
class Dilated(Pattern):
    left: int
    right: int
    step: int

    sees_itself = knows_distance_only = True

    @property
    def is_causal(self) -> bool:
        return self.right == 0

    @property
    def order(self):
        return residue_classes(self.step)

    def _visible(self, i, j, head, length):
        left, right, step = self.numbers
        distance = i - j
        near = (distance <= left * step) & (distance >= -right * step)
        return near & (distance % step == 0)

    def _known(self, box):
        left, right, step = self.numbers
        return box.band(left * step, right * step, step)

    @property
    def numbers(self) -> tuple[int, int, int]:
        most = LARGEST // self.step  # steps that no distance exceeds, and whose product fits
        return min(self.left, most), min(self.right, most), self.step

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        left, right, step = numbers
        distance = i - j
        near = (distance <= left * step) & (distance >= -right * step)
        return near & (distance % step == 0)

    def __repr__(self) -> str:
        width = f"{self.left + 1}" if self.right == 0 else f"{self.left}, {self.right}"
        return f"dilated({width}, {self.step})"
