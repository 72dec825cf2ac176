"""``near2d(...)``, ``tiles2d(...)``: the pixels around the query's own, and the same for videos."""

import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from kernels.common.interpreter import device_function
from kernels.patterns.algebra import Pattern
from kernels.patterns.parsing import at_least, constructor

Sizes = int | tuple[int, ...]  # of every axis, or of each
_LARGEST = 2**28  # tokens of a picture: its table takes 8 bytes for each


@constructor
def near2d(rows: int, columns: int, radius: Sizes, channels: int = 1) -> Pattern:
    """Visible when the key's pixel is in the window of the query's: neighbourhood attention.

    Position ``p`` is of pixel ``p // channels``, row by row. A window has ``2 radius + 1`` pixels
    on a side, or all that there are, and the query's in its middle; at a border it is moved inward,
    so that every query sees as many. Positions beyond the picture see nothing and are not seen.

    Args:
        rows, columns: pixels of the picture.
        radius: of the window, one number or one for each axis.
        channels: tokens of a pixel.

    Raises:
        ValueError: if a size is out of range, or the picture has more than 2**28 tokens.

    Source:
        Neighborhood Attention Transformer, Hassani et al. 2023, arXiv:2204.07143, section 3; its
        kernel size is ``2 radius + 1``.
    """
    return _near("near2d", (rows, columns), 1, radius, channels)


@constructor
def near3d(frames: int, rows: int, columns: int, radius: Sizes, channels: int = 1) -> Pattern:
    """The same in a video: frame by frame, each row by row; see `near2d`."""
    return _near("near3d", (frames, rows, columns), 1, radius, channels)


@constructor
def tiles2d(rows: int, columns: int, tile: Sizes, radius: Sizes, channels: int = 1) -> Pattern:
    """Visible when the key's tile of the picture is in the window of the query's.

    The rule of `near2d`, for tiles of ``tile`` pixels on a side in place of pixels; those at the
    far borders may be smaller. Tokens stand row by row. Where they are stored tile by tile, as the
    paper's kernels want it, the term is ``near2d(rows of tiles, columns of tiles, radius,
    channels=tokens of a tile)``.

    Raises:
        ValueError: if a size is out of range, or the picture has more than 2**28 tokens.

    Source:
        Sliding tile attention, Zhang et al. 2025, arXiv:2502.04507, section 3.
    """
    return _near("tiles2d", (rows, columns), tile, radius, channels)


@constructor
def tiles3d(
    frames: int, rows: int, columns: int, tile: Sizes, radius: Sizes, channels: int = 1
) -> Pattern:
    """The same in a video: frame by frame, each row by row; see `tiles2d`."""
    return _near("tiles3d", (frames, rows, columns), tile, radius, channels)


def _near(term: str, shape: tuple[int, ...], tile: Sizes, radius: Sizes, channels: int) -> Pattern:
    sizes = *shape, *([tile] if term.startswith("tiles") else []), radius
    given = f"{term}({', '.join(map(repr, sizes))}, {channels=})"
    tile, radius = (x if isinstance(x, tuple) else (x,) * len(shape) for x in (tile, radius))
    if not len(tile) == len(radius) == len(shape):
        raise ValueError(f"a size must be one number or one for each axis, got {given}.")
    axes = ("frames", "rows", "columns")[-len(shape) :]
    for axis, size, side, reach in zip(axes, shape, tile, radius, strict=True):
        at_least(1, given, **{axis: size}, tile=side, channels=channels)
        at_least(0, given, radius=reach)
    near = Near(shape, tile, radius, channels)
    if near.end > _LARGEST or near.bits > 31:
        raise ValueError(
            f"a picture must have at most 2**28 tokens, and numbers of its tiles on all axes that "
            f"fit in one word, got {given}."
        )
    return near


@dataclass(frozen=True)
class Axis:
    """One axis of the picture.

    Args:
        period: tokens from one pixel to the next.
        pixels: how many there are.
        tile: pixels of a tile.
        radius: tiles on each side of the middle of a window.
        bit: where the axis begins in a word of all axes.
    """

    period: int
    pixels: int
    tile: int
    radius: int
    bit: int

    @property
    def tiles(self) -> int:
        return -(-self.pixels // self.tile)

    @property
    def span(self) -> int:
        """Tiles of a window after its first."""
        return min(2 * self.radius, self.tiles - 1)

    @property
    def guard(self) -> int:
        """The bit above those of a tile's number."""
        return 1 << self.bit + (self.tiles - 1).bit_length()

    def tile_of(self, position: Tensor) -> Tensor:
        return position // self.period % self.pixels // self.tile

    def window_of(self, tile: Tensor) -> Tensor:
        """The first tile of the window around each tile."""
        return (tile - self.radius).clamp(0, self.tiles - 1 - self.span)


@dataclass(frozen=True, repr=False)
class Near(Pattern):
    shape: tuple[int, ...]
    tile: tuple[int, ...]
    radius: tuple[int, ...]
    channels: int

    has_table = True

    @property
    def end(self) -> int:
        """Tokens of the picture."""
        return math.prod(self.shape) * self.channels

    @property
    def axes(self) -> list[Axis]:
        """The last one, which is the fastest, first."""
        axes, period, bit = [], self.channels, 0
        for n in reversed(range(len(self.shape))):
            axes.append(Axis(period, self.shape[n], self.tile[n], self.radius[n], bit))
            period, bit = period * self.shape[n], axes[-1].guard.bit_length()
        return axes

    @property
    def bits(self) -> int:
        """Of a word that holds a place on every axis."""
        return self.axes[-1].guard.bit_length()

    def _visible(self, i, j, head, length):
        seen = (i < self.end) & (j < self.end)
        for axis in self.axes:
            distance = axis.tile_of(j) - axis.window_of(axis.tile_of(i))
            seen = seen & (distance >= 0) & (distance <= axis.span)
        return seen

    def _known(self, box):
        # Queries and keys are some rectangles each, ``(axes, rectangles, N)``: all pairs are asked.
        queries = [x[:, :, None] for x in self._rectangles(box.i_low, box.i_high)]
        keys = [x[:, None] for x in self._rectangles(box.j_low, box.j_high)]
        exists = (queries[0] <= queries[1]).all(dim=0) & (keys[0] <= keys[1]).all(dim=0)
        some, every = exists, torch.ones_like(exists)
        for n, axis in enumerate(self.axes):
            low, high = (axis.window_of(x[n] // axis.tile) for x in queries)
            first, last = (x[n] // axis.tile for x in keys)
            some = some & (low <= last) & (first <= high + axis.span)
            every = every & (high <= first) & (last <= low + axis.span)
        inside = (box.i_high < self.end) & (box.j_high < self.end)
        every = (every | ~exists).all(dim=1).all(dim=0) & inside
        return box.exact(some.any(dim=1).any(dim=0), every, when=box.contiguous)

    def _rectangles(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Rectangles that the pixels from one position to another make up, last axis first.

        First and last pixel ``(axes, rectangles, N)``; none where the first is after the last.
        """
        low, high = low // self.channels, high.clamp(max=self.end - 1) // self.channels
        parts = _cut(low, high, self.shape)
        first, last = (
            torch.stack([torch.stack(part[side]) for part in parts], dim=1) for side in (0, 1)
        )
        return first, torch.where(low <= high, last, -1)

    @property
    def numbers(self) -> tuple[int, int]:
        """Of words: the window, and the guards."""
        span = sum(axis.span << axis.bit for axis in self.axes)
        return span, sum(axis.guard for axis in self.axes)

    def table(self, head: int, heads: int, length: int) -> Tensor:
        """Of each position the tile, then of each the first tile of its window, as words."""
        position = torch.arange(self.end)  # whatever the length: callers may bring positions
        tile, window = torch.zeros(2, len(position), dtype=torch.int64)
        for axis in self.axes:
            place = axis.tile_of(position)
            tile += place << axis.bit
            window += axis.window_of(place) << axis.bit
        return torch.cat([tile, window])

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        span, guard, size, words = numbers
        end = size // 2
        i_inside, j_inside = (i >= 0) & (i < end), (j >= 0) & (j < end)
        window = tl.load(words + end + i, mask=i_inside, other=0)
        tile = tl.load(words + j, mask=j_inside, other=0)
        # All axes at once: a guard is left standing where the axis above it does not go below 0.
        inside = (tile + guard - window) & (window + span + guard - tile) & guard
        return (inside == guard) & i_inside & j_inside

    def __repr__(self) -> str:
        tiled = set(self.tile) != {1}
        sizes = [*self.shape, *([_text(self.tile)] if tiled else []), _text(self.radius)]
        sizes += [f"channels={self.channels}"] if self.channels > 1 else []
        return f"{'tiles' if tiled else 'near'}{len(self.shape)}d({', '.join(map(str, sizes))})"


def _text(sizes: tuple[int, ...]) -> str:
    return str(sizes[0] if len(set(sizes)) == 1 else sizes)


def _cut(low: Tensor, high: Tensor, shape: tuple[int, ...]) -> list[tuple[list, list]]:
    """Rectangles of the pixels from ``low`` to ``high``, in no particular order.

    First and last pixel of each, on every axis, the last axis first.
    """
    if len(shape) == 1:
        return [([low], [high])]
    inner = math.prod(shape[1:])
    top, bottom, zero = low // inner, high // inner, torch.zeros_like(low)
    alone = top == bottom  # then there is no last row beside the first
    end = high % inner
    upper = _cut(low % inner, torch.where(alone, end, inner - 1), shape[1:])
    lower = _cut(zero, end, shape[1:])
    whole = [zero] * (len(shape) - 1), [zero + n - 1 for n in reversed(shape[1:])]
    return [
        *(([*first, top], [*last, top]) for first, last in upper),
        ([*whole[0], top + 1], [*whole[1], bottom - 1]),
        *(([*first, bottom], [*last, bottom - alone.long()]) for first, last in lower),
    ]
