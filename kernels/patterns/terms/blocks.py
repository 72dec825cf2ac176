"""``blocks(layout, block)``: any layout of blocks that is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from kernels.common.interpreter import device_function
from kernels.common.kept import kept
from kernels.patterns.algebra import Pattern
from kernels.patterns.parsing import at_least, constructor


@constructor
def blocks(layout: Tensor | str | Sequence[Sequence], block: int) -> Pattern:
    """Any given layout: visible when ``layout[i // block][j // block]``; nothing beyond it.

    Args:
        layout: ``(N, N)`` bool tensor, nested sequence of truth values, or rows of ``x`` and ``.``
            (a sequence, or one text with ``/`` or new lines between them, as ``draw`` gives it).
        block: tokens of a block.

    Raises:
        ValueError: if the layout is empty or not square, or ``block`` is not positive.
    """
    at_least(1, f"blocks(..., block={block})", block=block)
    rows = layout.replace("/", "\n").split() if isinstance(layout, str) else layout
    rows = rows.tolist() if isinstance(rows, Tensor) else rows
    rows = tuple(
        row if isinstance(row, str) else "".join(".x"[bool(seen)] for seen in row) for row in rows
    )
    widths = sorted({len(row) for row in rows})
    if widths != [len(rows)] or set("".join(rows)) - set(".x"):
        raise ValueError(
            f"blocks needs a square layout of x and ., got {len(rows)} rows of {widths} cells "
            f"from {sorted(set(''.join(rows)))}."
        )
    return Blocks(rows, block)


@dataclass(frozen=True, repr=False)
class Blocks(Pattern):
    layout: tuple[str, ...]
    block: int

    has_table = True

    def _visible(self, i, j, head, length):
        seen, last = _cells(self.layout, str(i.device)), len(self.layout) - 1
        i, j = i // self.block, j // self.block
        inside = (i <= last) & (j <= last)
        return seen[i.clamp(max=last), j.clamp(max=last)] & inside

    def _known(self, box):
        box, end = box.blocks(self.block), len(self.layout)
        top, bottom, left, right = box.i_low, box.i_high + 1, box.j_low, box.j_high + 1
        area = (bottom - top) * (right - left)
        top, bottom, left, right = (x.clamp(max=end) for x in (top, bottom, left, right))
        sums = _sums(self.layout, str(area.device))
        seen = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return box.exact(seen > 0, seen == area, when=box.contiguous)

    @property
    def numbers(self) -> tuple[int, int]:
        return self.block, len(self.layout)

    def table(self, head: int, heads: int, length: int) -> Tensor:
        return _cells(self.layout, "cpu").flatten()

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        block, rows, _, cells = numbers
        i_block, j_block = i // block, j // block
        inside = (i_block < rows) & (j_block < rows)
        return tl.load(cells + i_block * rows + j_block, mask=inside, other=0) != 0

    def __repr__(self) -> str:
        return f"blocks({'/'.join(self.layout)!r}, block={self.block})"


@kept(maxsize=16)
def _cells(rows: tuple[str, ...], device: str) -> Tensor:
    """Whether each block is visible, ``(N, N)`` bool."""
    return torch.tensor([[cell == "x" for cell in row] for row in rows], device=device)


@kept(maxsize=16)
def _sums(rows: tuple[str, ...], device: str) -> Tensor:
    """Visible blocks above and to the left of each corner, ``(N + 1, N + 1)`` int64."""
    sums = _cells(rows, device).long().cumsum(0).cumsum(1)
    return torch.nn.functional.pad(sums, (1, 0, 1, 0))
