"""``window(w)``: a band around the diagonal."""

from dataclasses import dataclass

import triton.language as tl

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import Pattern
from kernels.patterns.parsing import at_least, constructor


@constructor
def window(left: int, right: int | None = None, *, block: int = 1) -> Pattern:
    """A band around the diagonal.

    ``window(w)``: ``0 <= i - j < w``, that is ``w`` keys counting the query itself.
    ``window(left, right)``: ``i - left <= j <= i + right``.
    With ``block=b`` the same rule holds for the block numbers ``i // b`` and ``j // b``: the
    window of BigBird (Zaheer et al. 2020, arXiv:2007.14062, section 2).

    Raises:
        ValueError: if a size is negative, or ``window(w)`` would see nothing.
    """
    at_least(1, f"window(..., block={block})", block=block)
    if right is None:
        at_least(1, f"window({left})", keys=left)
        return Window(left - 1, 0, block)
    at_least(0, f"window({left}, {right})", left=left, right=right)
    return Window(left, right, block)


@dataclass(frozen=True, repr=False)
class Window(Pattern):
    left: int
    right: int
    block: int

    sees_itself = True

    @property
    def is_causal(self) -> bool:
        return self.right == 0 and self.block == 1

    @property
    def knows_distance_only(self) -> bool:
        return self.block == 1

    @property
    def past_seen_up_to(self) -> int:
        return (self.left + 1) * self.block

    @property
    def future_seen_up_to(self) -> int:
        return (self.right + 1) * self.block

    def _visible(self, i, j, head, length):
        distance = i // self.block - j // self.block if self.block > 1 else i - j
        return (distance <= self.left) & (distance >= -self.right)

    def _known(self, box):
        if self.block == 1:
            return box.band(self.left, self.right)
        low, high = box.blocks(self.block).distance
        some = (low <= self.left) & (high >= -self.right)
        return box.exact(some, (high <= self.left) & (low >= -self.right), when=box.contiguous)

    @property
    def compiled_for(self) -> bool:
        return self.block > 1

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.left, self.right, self.block

    @staticmethod
    @device_function
    def rule(i, j, numbers, BLOCKS: tl.constexpr):
        left, right, block = numbers
        if BLOCKS:
            distance = i // block - j // block
        else:
            distance = i - j
        return (distance <= left) & (distance >= -right)

    def __repr__(self) -> str:
        width = f"{self.left + 1}" if self.right == 0 else f"{self.left}, {self.right}"
        return f"window({width})" if self.block == 1 else f"window({width}, block={self.block})"
