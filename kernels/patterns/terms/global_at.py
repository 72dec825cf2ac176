"""``global_at(0, 17, 400)``: the tokens at these positions see all and are seen by all."""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from kernels.common.interpreter import device_function
from kernels.common.kept import kept
from kernels.patterns.algebra import Pattern
from kernels.patterns.parsing import at_least, constructor


@constructor
def global_at(*positions: int) -> Pattern:
    """Visible when ``i`` or ``j`` is one of ``positions``: global tokens anywhere in the sequence.

    Every tile that such a token's row or column meets is visited: where they are many and apart,
    leading ones (`global_tokens`) cost less.

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
class GlobalAt(Pattern):
    positions: tuple[int, ...]

    has_table = True

    def _visible(self, i, j, head, length):
        return self._has(i) | self._has(j)

    def _has(self, position: Tensor) -> Tensor:
        return self._before(position + 1) > self._before(position)

    def _known(self, box):
        i_some, i_every = self._among(box.i_low, box.i_high)
        j_some, j_every = self._among(box.j_low, box.j_high)
        return box.exact(i_some | j_some, i_every | j_every, when=box.contiguous)

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

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        size, words = numbers
        i_word = tl.load(words + i // 32, mask=(i >= 0) & (i // 32 < size), other=0)
        j_word = tl.load(words + j // 32, mask=(j >= 0) & (j // 32 < size), other=0)
        return (((i_word >> (i % 32)) & 1) | ((j_word >> (j % 32)) & 1)) != 0

    def __repr__(self) -> str:
        return f"global_at({', '.join(map(str, self.positions))})"


@kept(maxsize=64)
def _tensor(positions: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(positions, device=device)
