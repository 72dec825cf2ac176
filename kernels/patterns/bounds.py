"""What is certain about boxes of cells before any cell is looked at.

A box is all cells (i, j) of some neighbouring queries and some neighbouring keys. A term says of
boxes, by formula, what it knows (`Known`); ``&``, ``|`` and ``~`` combine that. This is how lists
of tiles are found: see `kernels.patterns.find_tiles`.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.patterns.order import SEQUENCE, Order


@dataclass(frozen=True, eq=False)
class Known:
    """What is certain of each of ``N`` boxes: bool tensors ``(N,)``, true only if it is certain.

    Args:
        some: a cell is visible.
        every: all cells are visible.
        gap: a cell is not visible.
        none: no cell is visible.
    """

    some: Tensor
    every: Tensor
    gap: Tensor
    none: Tensor

    def __and__(self, other: "Known") -> "Known":
        # Two boxes of which each has a visible cell may have none in common.
        return Known(
            self.some & other.every | self.every & other.some,
            self.every & other.every,
            self.gap | other.gap,
            self.none | other.none,
        )

    def __or__(self, other: "Known") -> "Known":
        return ~(~self & ~other)

    def __invert__(self) -> "Known":
        return Known(self.gap, self.none, self.some, self.every)


@dataclass(frozen=True, eq=False)
class Box:
    """``N`` boxes of cells; tensors are ``(N,)`` int64, ``head`` is ``()`` if there is only one.

    Args:
        i_low, i_high: first and last position of the queries.
        j_low, j_high: first and last position of the keys.
        head: number of the head.
        sides: queries and keys of a box that is not cut by the end of the sequence.
        q_order, k_order: how queries and keys are stored.
        queries, keys: tokens of the sequence that there are.
    """

    i_low: Tensor
    i_high: Tensor
    j_low: Tensor
    j_high: Tensor
    head: Tensor
    sides: tuple[int, int]
    q_order: Order
    k_order: Order
    queries: int
    keys: int

    @property
    def length(self) -> int:
        """Tokens of the sequence that queries and keys are from."""
        return max(self.queries, self.keys)

    @property
    def contiguous(self) -> bool:
        """Whether a box holds every position from its first to its last."""
        return self.q_order == self.k_order == SEQUENCE

    @property
    def spacing(self) -> int | None:
        """The distance of neighbours, if queries and keys are one evenly spaced set; else None."""
        return self.q_order.spacing if self.q_order == self.k_order else None

    @property
    def distance(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest ``i - j`` of each box."""
        return self.i_low - self.j_high, self.i_high - self.j_low

    def blocks(self, block: int) -> "Box":
        """The same boxes, with numbers of blocks for positions."""
        if block == 1:
            return self
        sides = "i_low", "i_high", "j_low", "j_high"
        return replace(self, **{side: getattr(self, side) // block for side in sides})

    def of(self, chosen: Tensor) -> "Box":
        """Some of the boxes."""
        names = "i_low", "i_high", "j_low", "j_high"
        part = {name: getattr(self, name)[chosen] for name in names}
        return replace(self, head=self.head.expand_as(self.i_low)[chosen], **part)

    def meets_diagonal(self) -> Tensor:
        """Whether a box surely holds a cell with ``i == j``."""
        meets = (self.i_low <= self.j_high) & (self.j_low <= self.i_high)
        return meets if self.spacing else torch.zeros_like(meets)

    def constant(self, visible: bool) -> Known:
        """All cells are visible, or none is."""
        yes = torch.full_like(self.i_low, visible, dtype=torch.bool)
        return Known(yes, yes, ~yes, ~yes)

    def exact(self, some: Tensor, every: Tensor, when: bool = True) -> Known:
        """Known from formulas that are exact under a condition, and else only true of all the
        positions between the first and the last, some of which a box may lack.

        Args:
            some: a cell is visible; without the condition: of all positions in between.
            every: all cells are visible.
            when: the condition, such as ``box.contiguous``.
        """
        if when:
            return Known(some, every, ~every, ~some)
        return Known(every, every, ~some, ~some)

    def band(self, left: int | None, right: int, step: int = 1) -> Known:
        """Visible: each ``i - j`` from ``-right`` to ``left`` (None: all) that ``step`` divides."""
        low, high = self.distance
        inside_low = low.clamp(min=-right)
        inside_high = high if left is None else high.clamp(max=left)
        spacing = self.spacing or 1
        stride = math.lcm(spacing, step)
        some = (
            inside_high // stride * stride >= inside_low
            if stride > 1
            else (inside_high >= inside_low)
        )
        whole = (inside_low == low) & (inside_high == high)
        if spacing % step:  # neighbours: of more than one distance, the step skips some
            whole = whole & (low == high) & some
        # The first and the last position are in a box whatever its order: `j <= i` shows there.
        causal = left is None and step == 1
        return self.exact(some, whole, when=causal or self.spacing is not None)
