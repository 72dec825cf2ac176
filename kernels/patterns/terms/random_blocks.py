"""``random_blocks(r, block)``: blocks of keys drawn for each block of queries, head and layer.

Every rank, a resumed run and the backward pass draw the same blocks, because nothing but the
arguments enters: no generator, no state.
"""

from dataclasses import dataclass, field, replace

import torch
import triton.language as tl
from torch import Tensor

from kernels.common.interpreter import device_function
from kernels.common.kept import kept
from kernels.patterns.algebra import And, Not, Nothing, Or, Pattern
from kernels.patterns.bounds import Box, Known
from kernels.patterns.draws import draw_blocks
from kernels.patterns.find_tiles import descend, look_whether
from kernels.patterns.grid import Grid
from kernels.patterns.order import SEQUENCE
from kernels.patterns.parsing import at_least, constructor
from kernels.patterns.runs import Runs
from kernels.patterns.terms.full import Full

LARGEST_BLOCK = 2**15  # whether a block may be drawn can take a look at every cell of it


@constructor
def random_blocks(count: int, block: int, seed: int = 0, layer: int = 0) -> Pattern:
    """Visible when the key's block was drawn for the query's block.

    The candidates of a query block are the key blocks with at least one cell that everything
    ``&``-ed around the term allows, and no such cell in the terms ``|``-ed beside it;
    ``min(count, candidates)`` of them are drawn uniformly without replacement, as a pure function
    of (seed, layer, head, query block). Under ``causal()`` a row does not depend on the length;
    otherwise the number of blocks enters the draw. Blocks are whole: a last block that the length
    cuts short counts like any other.

    Source:
        BigBird, Zaheer et al. 2020, arXiv:2007.14062, section 2; unlike Google's code, no block is
        drawn twice, none is drawn that the window or the global tokens show already, and all of
        the sequence is drawn from.

    Raises:
        ValueError: if ``count`` or ``block`` is not positive, or a block has more than 32,768
            tokens.
    """
    at_least(1, f"random_blocks({count})", count=count)
    at_least(1, f"random_blocks(..., block={block})", block=block)
    if block > LARGEST_BLOCK:
        raise ValueError(f"random blocks have at most {LARGEST_BLOCK:,} tokens, got block={block}.")
    given = f"random_blocks(..., seed={seed}, layer={layer})"
    at_least(-(2**63), given, bits=63, seed=seed, layer=layer)
    return RandomBlocks(count, block, seed, layer)


@dataclass(frozen=True)
class Surroundings:
    """What stands around a random term in its expression, without random terms.

    Random terms are drawn independently: to each other they count as everything when &-ed and as
    nothing when |-ed.
    """

    around: Pattern  # everything that is &-ed with the term
    beside: Pattern  # everything that is |-ed with the term

    @property
    def differ_by_head(self) -> bool:
        return self.around.differs_by_head or self.beside.differs_by_head

    def of_head(self, head: int) -> "Surroundings":
        return Surroundings(self.around.of_head(head), self.beside.of_head(head))


NO_SURROUNDINGS = Surroundings(Full(), Nothing())


@dataclass(frozen=True, repr=False)
class RandomBlocks(Pattern):
    count: int
    block: int
    seed: int = 0
    layer: int = 0
    surroundings: Surroundings | None = field(default=None, kw_only=True)  # None: not bound yet

    differs_by_head = has_table = True

    def on_layer(self, layer):
        return replace(self, layer=self.layer + layer)

    def draws(self, heads: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """Drawn key blocks, ``(heads, query blocks, count)`` int64, -1 where candidates ran out.

        Of a term that was never bound, every block is a candidate.
        """
        blocks = -(-length // self.block)
        surroundings = self.surroundings or NO_SURROUNDINGS
        alike: dict[Surroundings, list[int]] = {}  # heads by what surrounds them
        for head in range(heads):
            seen = surroundings.of_head(head) if surroundings.differ_by_head else surroundings
            alike.setdefault(seen, []).append(head)
        parts = []
        for seen, numbers in alike.items():
            # A causal row does not depend on the length: one draw serves all up to a power of two.
            rows = 1 << (blocks - 1).bit_length() if seen.around.is_causal else blocks
            parts.append(_draws(self, seen, tuple(numbers), rows, str(device))[:, :blocks])
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([head for numbers in alike.values() for head in numbers])
        return torch.cat(parts)[order.argsort().to(device)]

    def _visible(self, i, j, head, length):
        i_block, j_block = i // self.block, j // self.block
        heads = int(head.max() if isinstance(head, Tensor) else head) + 1
        if length is None:
            if not self.surroundings.around.is_causal:
                raise ValueError(
                    f"{self!r} without causal() depends on the number of tokens, got length=None; "
                    f"pass `length`."
                )
            length = (int(i_block.max()) + 1) * self.block  # no row depends on the length
        head = head.to(i.device) if isinstance(head, Tensor) else head
        drawn = self.draws(heads, length, i.device)[head, i_block]  # (..., count)
        seen = torch.zeros_like(i + j, dtype=torch.bool)
        for n in range(self.count):
            seen = seen | (drawn[..., n] == j_block)
        return seen

    def _known(self, box):
        unknown = torch.zeros_like(box.i_low, dtype=torch.bool)
        if not box.contiguous or not len(unknown):
            return Known(unknown, unknown, unknown, unknown)
        drawn = self.draws(int(box.head.max()) + 1, box.length, box.head.device)
        touched = _touched(drawn, self.block, box.sides, box.queries, box.keys)
        row, column = box.i_low // box.sides[0], box.j_low // box.sides[1]
        number = _number(box.head, row, column, box.sides, box.queries, box.keys)
        some = torch.isin(number, touched)
        inside = box.blocks(self.block)
        whole = some & (inside.i_low == inside.i_high) & (inside.j_low == inside.j_high)
        return Known(some, whole, ~some, ~some)  # of a box beyond one block, a gap is not certain

    def _scattered(self, grid):
        if grid.q_order != SEQUENCE or grid.k_order != SEQUENCE:
            return None
        drawn = self.draws(max(grid.heads) + 1, max(grid.queries, grid.keys), grid.device)
        drawn = drawn[list(grid.heads)]  # a plane is a head
        return _touched(drawn, self.block, grid.tile, grid.queries, grid.keys), Nothing()

    @property
    def compiled_for(self) -> int:
        return self.count

    @property
    def numbers(self) -> tuple[int]:
        return (self.block,)

    def table(self, head: int, heads: int, length: int) -> Tensor:
        """What is drawn for each block of queries."""
        return self.draws(heads, length)[head].flatten().cpu()

    @staticmethod
    @device_function
    def rule(i, j, numbers, COUNT: tl.constexpr):
        block, size, draws = numbers
        i_block, j_block = i // block, j // block
        seen = (i_block < 0) & (j_block < 0)
        for n in tl.static_range(COUNT):
            drawn = tl.load(draws + i_block * COUNT + n, mask=i_block * COUNT < size, other=-1)
            seen = seen | (drawn == j_block)
        return seen

    def __repr__(self) -> str:
        options = "".join(f", {k}={v}" for k in ("seed", "layer") if (v := getattr(self, k)))
        return f"random_blocks({self.count}, block={self.block}{options})"


# ------------------------------------------------------------------------------ surroundings


def bind(pattern: Pattern, surroundings: Surroundings = NO_SURROUNDINGS) -> Pattern:
    """The pattern, whose random terms know what stands around them; those that do keep it."""
    match pattern:
        case RandomBlocks(surroundings=None):
            return replace(pattern, surroundings=surroundings)
        case _ if not pattern.operands:
            return pattern
    kind = type(pattern)
    if not isinstance(pattern, And | Or):  # alternatives of heads, or a complement
        return pattern._map(lambda operand: bind(operand, surroundings))
    bound = []
    for n, operand in enumerate(pattern.operands):
        around, beside = surroundings.around, surroundings.beside
        for other in pattern.operands[:n] + pattern.operands[n + 1 :]:
            if kind is And:
                around = around & _without_random(other, Full())
            else:
                beside = beside | _without_random(other, Nothing())
        bound.append(bind(operand, Surroundings(around, beside)))
    return kind(tuple(bound))


def _without_random(pattern: Pattern, replacement: Pattern) -> Pattern:
    """The pattern with every random term replaced."""
    match pattern:
        case RandomBlocks():
            return replacement
        case Not():
            replacement = Nothing() if replacement == Full() else Full()
    return pattern._map(lambda operand: _without_random(operand, replacement))


# ------------------------------------------------------------------------------ draws


@kept(maxsize=64)
def _draws(
    term: RandomBlocks, surroundings: Surroundings, heads: tuple[int, ...], blocks: int, device: str
) -> Tensor:
    """Drawn key blocks of some heads whose surroundings are alike, ``(heads, blocks, count)``."""
    key = (term.seed, term.layer, *(() if surroundings.around.is_causal else (blocks,)))
    candidates = _candidates(surroundings, term.block, blocks, device)
    return draw_blocks(candidates, blocks, term.count, heads, key)


def _candidates(surroundings: Surroundings, block: int, blocks: int, device: str) -> Runs:
    """Runs of key blocks that may be drawn for each query block."""
    around, taken = surroundings.around, surroundings.around & surroundings.beside
    length = blocks * block
    grid = Grid(SEQUENCE, SEQUENCE, length, length, (block, block), (0,), torch.device(device))

    def known(box: Box) -> Known:
        """What is certain of the candidates among the blocks of a box, not of its cells."""
        allowed, seen = around._known(box), taken._known(box)
        candidate, none = allowed.some & seen.none, allowed.none
        if box.sides == grid.tile:  # a single block
            none = none | seen.some
        return Known(candidate, allowed.every & seen.none, none, none)

    found = descend(grid, known)
    live, doubtful = found.sure.clone(), (~found.sure).nonzero()[:, 0]
    place = found.single[:, doubtful]
    seen = look_whether(around, grid, place)[0], look_whether(taken, grid, place)[0]
    live[doubtful] = seen[0] & ~seen[1]
    return found.runs(live, live)


# ------------------------------------------------------------------------------ boxes


def _touched(drawn: Tensor, block: int, sides: tuple[int, int], queries: int, keys: int) -> Tensor:
    """The boxes that hold a cell of a drawn block, by `_number`, ascending.

    Args:
        drawn: key blocks ``(heads, query blocks, count)``, -1 for none.
        block: tokens of a block.
        sides: queries and keys of a box.
        queries, keys: tokens that there are.
    """
    row = torch.arange(drawn.shape[1], device=drawn.device)[:, None]
    exists = (drawn >= 0) & (row * block < queries) & (drawn * block < keys)
    head, row, place = exists.nonzero(as_tuple=True)
    column = drawn[head, row, place]
    rows = _boxes_of(row, block, sides[0], queries)[:, :, None]
    columns = _boxes_of(column, block, sides[1], keys)[:, None, :]
    return _number(head[:, None, None], rows, columns, sides, queries, keys).unique()


def _number(head, row, column, sides: tuple[int, int], queries: int, keys: int) -> Tensor:
    """A number for each box of these sides."""
    return (head * -(-queries // sides[0]) + row) * -(-keys // sides[1]) + column


def _boxes_of(number: Tensor, block: int, side: int, tokens: int) -> Tensor:
    """The boxes that blocks ``(N,)`` touch along one side, ``(N, most)``, some repeated."""
    first = number * block // side
    last = (number * block + block - 1).clamp(max=tokens - 1) // side
    most = int((last - first).max()) if len(number) else 0  # boxes after the first
    after = torch.arange(most + 1, device=number.device)
    return (first[:, None] + after).minimum(last[:, None])
