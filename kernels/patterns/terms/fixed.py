"""``fixed(block, cells)``: the query's own block, and the summary cells of every block."""

from dataclasses import dataclass

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import Not, Pattern
from kernels.patterns.order import SEQUENCE, Order
from kernels.patterns.parsing import at_least, constructor
from kernels.patterns.terms.window import Window


@constructor
def fixed(block: int, cells: int, sub_block: int = 0) -> Pattern:
    """Visible when the key is in the query's block, or a summary cell of its own block.

    Blocks have ``block`` tokens; the summary cells of each are ``cells`` neighbours, the last ones
    or, with ``sub_block=s``, those that stand ``s * cells`` before. The paper's pattern is
    ``causal() & fixed(block, cells)``; its heads use sub-blocks of their own.

    Raises:
        ValueError: if a size is out of range, or a block is too short for the sub-block.

    Source:
        Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    _check("fixed", block, cells, sub_block)
    return Fixed(block, cells, sub_block)


@constructor
def summary(block: int, cells: int, sub_block: int = 0) -> Pattern:
    """Visible when the key is a summary cell of its block: the second part of `fixed` alone.

    ``fixed(l, c)`` is ``window(1, block=l) | summary(l, c)``.

    Raises:
        ValueError: if a size is out of range, or a block is too short for the sub-block.

    Source:
        Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    _check("summary", block, cells, sub_block)
    return Summary(block, cells, sub_block)


def _check(term: str, block: int, cells: int, sub_block: int) -> None:
    given = f"{term}({block}, {cells}, sub_block={sub_block})"
    at_least(1, given, block=block, cells=cells)
    at_least(0, given, sub_block=sub_block)
    if cells * (sub_block + 1) > block:
        raise ValueError(f"cells * (sub_block + 1) must not exceed block, got {given}.")


@dataclass(frozen=True, repr=False)
class Summary(Pattern):
    block: int
    cells: int
    sub_block: int

    @property
    def first(self) -> int:
        """The first summary cell of a block."""
        return self.block - self.cells * (self.sub_block + 1)

    @property
    def order(self):
        """The summary cells alone, gathered from all blocks."""
        return SEQUENCE, Order(run=self.cells, step=self.block, first=self.first)

    def _visible(self, i, j, head, length):
        cell = j % self.block
        return ((cell >= self.first) & (cell < self.first + self.cells)).expand_as(i + j)

    def _known(self, box):
        if box.k_order == self.order[1]:
            return box.constant(True)
        cells = self._cells_before(box.j_high + 1) - self._cells_before(box.j_low)
        every = cells == box.j_high - box.j_low + 1
        return box.exact(cells > 0, every, when=box.contiguous)

    def _cells_before(self, position):
        """Summary cells before a position."""
        in_block = (position % self.block - self.first).clamp(0, self.cells)
        return position // self.block * self.cells + in_block

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.block, self.first, self.first + self.cells

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        block, first, last = numbers
        cell = j % block
        return (i == i) & (cell >= first) & (cell < last)

    def __repr__(self) -> str:
        return f"summary({_sizes(self)})"


@dataclass(frozen=True, repr=False)
class Fixed(Pattern):
    block: int
    cells: int
    sub_block: int

    sees_itself = True

    @property
    def local(self) -> Window:
        """The part that is the query's own block."""
        return Window(0, 0, self.block)

    @property
    def summary(self) -> Summary:
        """The part that is the summary cells of all blocks."""
        return Summary(self.block, self.cells, self.sub_block)

    @property
    def alternatives(self):
        return self.local, self.summary & Not(self.local)

    def _visible(self, i, j, head, length):
        own_block = self.local._visible(i, j, head, length)
        return own_block | self.summary._visible(i, j, head, length)

    def _known(self, box):
        return self.local._known(box) | self.summary._known(box)

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.summary.numbers

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        block, first, last = numbers
        cell = j % block
        return (i // block == j // block) | ((cell >= first) & (cell < last))

    def __repr__(self) -> str:
        return f"fixed({_sizes(self)})"


def _sizes(term: Summary | Fixed) -> str:
    option = f", sub_block={term.sub_block}" if term.sub_block else ""
    return f"{term.block}, {term.cells}{option}"
