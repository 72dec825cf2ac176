"""``global_at(0, 17, 400)``: the tokens at these positions see all and are seen by all."""

import functools
import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from kernels.common.interpreter import device_function
from kernels.common.kept import kept
from kernels.patterns.algebra import Not, Pattern
from kernels.patterns.order import SEQUENCE, Listed
from kernels.patterns.parsing import at_least, constructor

_TILE = 64  # tokens of a tile that kernels choose most often


@constructor
def global_at(*positions: int) -> Pattern:
    """Visible when ``i`` or ``j`` is one of ``positions``: global tokens anywhere in the sequence.

    Kernels gather them, so that they visit as few tiles as neighbours would, wherever they stand;
    beside other documents in a row, every tile is visited that a token's row or column meets.

    Raises:
        ValueError: if there is no position, or one is negative.

    Source:
        Longformer, Beltagy et al. 2020, arXiv:2004.05150, section 3.1, whose tasks choose them.
    """
    if not positions:
        raise ValueError("global_at needs at least one position, got none.")
    for position in positions:
        at_least(0, f"global_at({', '.join(map(str, positions))})", position=position)
    return GlobalAt(tuple(sorted(set(positions))))


@dataclass(frozen=True, repr=False)
class _At(Pattern):
    """Tokens at some positions, and what a rule needs to know them."""

    positions: tuple[int, ...]

    has_table = True

    def _has(self, position: Tensor) -> Tensor:
        return self._before(position + 1) > self._before(position)

    def _among(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Whether some position of a range is global, and whether every one is."""
        count = self._before(high + 1) - self._before(low)
        return count > 0, count == high + 1 - low

    def _before(self, position: Tensor) -> Tensor:
        """Global tokens before a position."""
        return torch.searchsorted(_tensor(self.positions, str(position.device)), position.long())

    def table(self, head: int, heads: int, length: int) -> Tensor:
        """One bit a position, 32 in a word."""
        position = torch.tensor(self.positions)
        words = torch.zeros(self.positions[-1] // 32 + 1, dtype=torch.int64)
        return words.index_add_(0, position // 32, 1 << position % 32)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.positions))})"


@device_function
def _is_at(position, numbers):
    """Whether the table has the bit of each position."""
    size, words = numbers
    inside = (position >= 0) & (position // 32 < size)
    word = tl.load(words + position // 32, mask=inside, other=0)
    return ((word >> (position % 32)) & 1) != 0


class GlobalKeys(_At):
    """The columns of `global_at`: visible when the key is one of the positions."""

    name = "global_keys"

    @functools.cached_property
    def order(self):
        return SEQUENCE, Listed(positions=self.positions)

    def _visible(self, i, j, head, length):
        return self._has(j).expand_as(i + j)

    def _known(self, box):
        if box.k_order == self.order[1]:
            return box.constant(True)
        return box.exact(*self._among(box.j_low, box.j_high), when=box.k_order == SEQUENCE)

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        return (i == i) & _is_at(j, numbers)


class GlobalQueries(_At):
    """The rows of `global_at`: visible when the query is one of the positions."""

    name = "global_queries"

    @functools.cached_property
    def order(self):
        return Listed(positions=self.positions), SEQUENCE

    def _visible(self, i, j, head, length):
        return self._has(i).expand_as(i + j)

    def _known(self, box):
        if box.q_order == self.order[0]:
            return box.constant(True)
        return box.exact(*self._among(box.i_low, box.i_high), when=box.q_order == SEQUENCE)

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        return (j == j) & _is_at(i, numbers)


class GlobalAt(_At):
    name = "global_at"

    @property
    def alternatives(self):
        tiles = {position // _TILE for position in self.positions}
        if len(tiles) == math.ceil(len(self.positions) / _TILE):
            return (self,)  # neighbours are dense as they stand
        columns, rows = GlobalKeys(self.positions), GlobalQueries(self.positions)
        return columns, rows & Not(columns)

    def _visible(self, i, j, head, length):
        return self._has(i) | self._has(j)

    def _known(self, box):
        i_some, i_every = self._among(box.i_low, box.i_high)
        j_some, j_every = self._among(box.j_low, box.j_high)
        return box.exact(i_some | j_some, i_every | j_every, when=box.contiguous)

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        return _is_at(i, numbers) | _is_at(j, numbers)


@kept(maxsize=64)
def _tensor(positions: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(positions, device=device)
