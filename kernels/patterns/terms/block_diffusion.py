"""``block_diffusion(block, length)``: training a block diffusion model on noised and clean text."""

from dataclasses import dataclass

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import LARGEST, Pattern
from kernels.patterns.parsing import at_least, constructor


@constructor
def block_diffusion(block: int, length: int) -> Pattern:
    """Visible as block diffusion trains: ``length`` noised tokens, then the same text clean.

    A noised token sees the noised ones of its own block of ``block`` tokens, and the clean ones of
    all earlier blocks. A clean token sees the clean ones of its own block and of earlier ones.
    Positions beyond the ``2 length`` tokens see nothing and are not seen.

    Raises:
        ValueError: if a size is not positive.

    Source:
        Block Diffusion, Arriola et al. 2025, arXiv:2503.09573, section 3.1 and appendix B.6.
    """
    at_least(1, f"block_diffusion({block}, {length})", block=block, length=length)
    return BlockDiffusion(block, length)


@dataclass(frozen=True, repr=False)
class BlockDiffusion(Pattern):
    block: int
    length: int

    @property
    def end(self) -> int:
        return min(2 * self.length, LARGEST)

    def _visible(self, i, j, head, length):
        i_clean, j_clean = i >= self.length, j >= self.length
        i_block = (i - i_clean * self.length) // self.block
        j_block = (j - j_clean * self.length) // self.block
        clean = j_clean & (j_block < i_block + i_clean)
        noised = ~i_clean & ~j_clean & (i_block == j_block)
        return (clean | noised) & (i < self.end) & (j < self.end)

    def _known(self, box):
        some, every = box.i_low < 0, (box.i_high < self.end) & (box.j_high < self.end)
        for i_clean in (0, 1):
            for j_clean in (0, 1):
                first, last, i_exists = self._blocks(box.i_low, box.i_high, i_clean)
                low, high, j_exists = self._blocks(box.j_low, box.j_high, j_clean)
                if j_clean:
                    any_seen, all_seen = low < last + i_clean, high < first + i_clean
                elif i_clean:
                    any_seen, all_seen = some & ~some, some & ~some
                else:
                    any_seen = (low <= last) & (first <= high)
                    all_seen = (low == last) & (first == high)
                some = some | any_seen & i_exists & j_exists
                every = every & (all_seen | ~i_exists | ~j_exists)
        return box.exact(some, every, when=box.contiguous)

    def _blocks(self, low, high, clean: int):
        """First and last block of the noised or clean tokens of a range, and whether it has any."""
        low = (low - clean * self.length).clamp(min=0)
        high = (high - clean * self.length).clamp(max=self.length - 1)
        return low // self.block, high // self.block, low <= high

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.block, self.length, self.end

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        block, length, end = numbers
        i_clean, j_clean = (i >= length).to(i.dtype), (j >= length).to(j.dtype)
        i_block, j_block = (i - i_clean * length) // block, (j - j_clean * length) // block
        clean = (j_clean == 1) & (j_block < i_block + i_clean)
        noised = (i_clean + j_clean == 0) & (i_block == j_block)
        return (clean | noised) & (i < end) & (j < end)

    def __repr__(self) -> str:
        return f"block_diffusion({self.block}, {self.length})"
