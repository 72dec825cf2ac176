"""The attention patterns whose speed is measured, and the same patterns for FlexAttention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.patterns import parse
from kernels.patterns.algebra import And, Or, Pattern
from kernels.patterns.terms.causal import Causal
from kernels.patterns.terms.fixed import Fixed
from kernels.patterns.terms.full import Full
from kernels.patterns.terms.global_tokens import GlobalTokens
from kernels.patterns.terms.near import Near
from kernels.patterns.terms.random_blocks import RandomBlocks
from kernels.patterns.terms.strided import Strided
from kernels.patterns.terms.window import Window

HEADS = 16
TOKENS = 65_536  # batch times length, at every length

BIGBIRD_BLOCK = 64
_BIGBIRD = "global_tokens(128) | random_blocks(3, block=64)"
_TEXTS = {
    "window512": "causal() & window(512)",
    "window256": "causal() & window(256)",
    "window128": "causal() & window(128)",
    "longformer_causal": "causal() & (window(512) | global_tokens(16))",
    "longformer_bidir": "window(256, 256) | global_tokens(16)",
    "bigbird_causal": f"causal() & (window(3, block=64) | {_BIGBIRD})",
    "bigbird_bidir": f"window(1, 1, block=64) | {_BIGBIRD}",
    "strided": "causal() & (window(128) | strided(128))",
    "fixed": "causal() & fixed(128, 8)",
    "near2d_32_causal": "causal() & near2d(32, 32, 3, channels=3)",
    "near2d_32_bidir": "near2d(32, 32, 3, channels=3)",
    "near2d_64_causal": "causal() & near2d(64, 64, 3, channels=3)",
    "near2d_64_bidir": "near2d(64, 64, 3, channels=3)",
    "dense_d64": "causal()",
    "dense_d128": "causal()",
}


@dataclass(frozen=True)
class Case:
    """A measured pattern; with random blocks, every head of ours has a plan of its own."""

    name: str
    pattern: Pattern
    head_size: int

    @property
    def is_dense(self) -> bool:
        return isinstance(self.pattern, Causal | Full)

    @property
    def is_causal(self) -> bool:
        return "causal" in _TEXTS[self.name]

    @property
    def window(self) -> int | None:
        """Keys of a causal window, where that is the whole pattern."""
        return int(self.name.removeprefix("window")) if self.name.startswith("window") else None

    def lengths(self, asked: list[int]) -> list[int]:
        """The lengths to measure: a picture has its own alone."""
        terms = (self.pattern, *self.pattern.operands)
        return [term.end for term in terms if isinstance(term, Near)] or asked

    @property
    def has_random_blocks(self) -> bool:
        return "random_blocks" in _TEXTS[self.name]


CASES = {
    name: Case(name, parse(text), 128 if name == "dense_d128" else 64)
    for name, text in _TEXTS.items()
}


def pairs(case: Case, length: int, *, dense: bool = False, shared_plan: bool = False) -> float:
    """Live (query, key) pairs of one head, a mean over the heads where their plans differ.

    Args:
        dense: those of dense attention instead, causal if the pattern is.
        shared_plan: those of the plan of head 0.
    """
    if dense or case.is_dense:
        return length * (length + 1) / 2 if case.is_causal else float(length**2)
    return length * case.pattern.keys_per_query(length, 1 if shared_plan else HEADS)


# ------------------------------------------------------------------------------ FlexAttention

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(case: Case, length: int, device: torch.device) -> MaskMod:
    """The pattern as FlexAttention wants it, with the random blocks of head 0 for all heads.

    BigBird is made of whole blocks: one look-up in the table of what each block sees, and the
    diagonal if it is causal. That is cheaper than the terms one by one.
    """
    if not case.has_random_blocks:
        return _of(case.pattern)
    tiles = case.pattern.tiles(length, BIGBIRD_BLOCK, heads=1)
    seen = tiles.layout()[0].to(device)

    def table(b, h, i, j):
        return seen[i // BIGBIRD_BLOCK, j // BIGBIRD_BLOCK]

    return _both(_of(Causal()), table) if case.is_causal else table


def _of(pattern: Pattern) -> MaskMod:
    match pattern:
        case And(operands=operands):
            return _reduce(_both, operands)
        case Or(operands=operands):
            return _reduce(_either, operands)
        case Full():
            return lambda b, h, i, j: i >= 0
        case Causal():
            return lambda b, h, i, j: j <= i
        case Window(left=left, right=0, block=1):
            return lambda b, h, i, j: (i - j <= left) & (j <= i)
        case Window(left=left, right=right, block=1):
            return lambda b, h, i, j: (i - j <= left) & (j - i <= right)
        case GlobalTokens(count=count):
            return lambda b, h, i, j: (i < count) | (j < count)
        case Strided(stride=stride):
            return lambda b, h, i, j: (i - j) % stride == 0
        case Fixed(block=length, cells=cells, sub_block=0):
            return lambda b, h, i, j: (i // length == j // length) | (j % length >= length - cells)
        case Near(shape=(rows, columns), tile=(1, 1), radius=radius, channels=channels):
            return _near2d(rows, columns, radius, channels)
        case RandomBlocks():
            raise ValueError("random blocks are read from a table, see mask_mod")
    raise ValueError(f"no mask_mod is written for {pattern!r}")


def _near2d(rows: int, columns: int, radius: tuple[int, int], channels: int) -> MaskMod:
    """As attention-gym writes it: the middle of a window is kept away from the borders."""

    def near(b, h, i, j):
        i, j = i // channels, j // channels
        row = (i // columns).clamp(radius[0], rows - 1 - radius[0])
        column = (i % columns).clamp(radius[1], columns - 1 - radius[1])
        near_row = (row - j // columns).abs() <= radius[0]
        return near_row & ((column - j % columns).abs() <= radius[1])

    return near


def _reduce(join, operands) -> MaskMod:
    first, *rest = map(_of, operands)
    for mod in rest:
        first = join(first, mod)
    return first


def _both(left: MaskMod, right: MaskMod) -> MaskMod:
    return lambda b, h, i, j: left(b, h, i, j) & right(b, h, i, j)


def _either(left: MaskMod, right: MaskMod) -> MaskMod:
    return lambda b, h, i, j: left(b, h, i, j) | right(b, h, i, j)
