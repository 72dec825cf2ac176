"""Patterns and how they combine: ``&``, ``|``, and what a term is surrounded by."""

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.patterns.spans import (
    AND,
    DEAD,
    FULL,
    KNOWING,
    LIVE,
    NOT,
    OR,
    UNKNOWN,
    Grid,
    Order,
    Spans,
    constant,
    meeting,
)
from kernels.patterns.tiles import TileList, count_cells, list_tiles

ANY_LENGTH = 2**40  # more tokens than any sequence has
_ENCODED = 256  # texts are filled up to whole multiples, so that few lengths differ


class Pattern:
    """A set of visible cells ``(i, j)``, possibly another one in every head."""

    differs_by_head = False  # True if heads may see different keys
    variants = 1  # patterns of the longest `per_head` in it
    is_causal = False  # True if it is certain that no query sees a later key
    sees_itself = False  # True if it is certain that every query sees its own position
    shows_past = 0  # length of sequences up to which it is certain that all of the past is seen
    shows_future = 0  # the same of the future
    _encoded = None

    @property
    def encoded(self) -> Tensor:
        """The canonical text as bytes, uint8 on the CPU, filled up with spaces; made once.

        What an operator of torch takes: a number or a text would be a constant of the graph that
        `torch.compile` makes, and every layer with a pattern of its own would need its own graph.
        """
        if self._encoded is not None:
            return self._encoded
        text = repr(self)
        filled = text + " " * (-len(text) % _ENCODED)
        # On the CPU wherever a model is made: under `torch.device("meta")`, say.
        letters = [ord(letter) for letter in filled]
        encoded = torch.tensor(letters, dtype=torch.uint8, device="cpu")
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_encoded", encoded)
        return encoded

    def visible(self, i: Tensor, j: Tensor, head: int | Tensor = 0, *, length=None) -> Tensor:
        """Whether query ``i`` sees key ``j``: the definition, elementwise.

        Args:
            i, j: positions, integer tensors that broadcast against each other.
            head: head index, an int or a tensor on the CPU that broadcasts against ``i`` and ``j``.
            length: number of tokens; only bidirectional random blocks depend on it.

        Raises:
            ValueError: if the pattern depends on ``length`` and none was given.
        """
        return self.bound()._visible(i, j, head, length)

    def dense(self, length: int, head: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """All cells, ``(length, length)`` bool: the oracle of tests, quadratic in memory."""
        position = torch.arange(length, device=device)
        seen = self.visible(position[:, None], position[None, :], head, length=length)
        return seen.expand(length, length)

    def tiles(
        self,
        length: int,
        tile: int | tuple[int, int],
        heads: int = 1,
        device: torch.device | str = "cpu",
        keys: int | None = None,
    ) -> TileList:
        """The tiles with at least one visible cell, listed in O(listed tiles) time and memory.

        Args:
            length: number of queries.
            tile: tokens of a tile, or of a tile of (queries, keys).
            heads: number of heads; the list has one if they see alike.
            device: where to compute the list.
            keys: number of keys, default ``length``.

        Raises:
            ValueError: if a size is not positive.
        """
        sides = (tile, tile) if isinstance(tile, int) else tuple(tile)
        keys = length if keys is None else keys
        return list_tiles(self, Order(), Order(), length, keys, sides, heads, device)

    @functools.lru_cache(maxsize=256)  # noqa: B019 (patterns are small immutable values)
    def keys_per_query(self, length: int, heads: int = 1) -> float:
        """Mean number of visible keys over the queries and heads: the honest cost.

        Counted in O(live tiles) time and little memory.
        """
        heads = heads if self.differs_by_head else 1
        return count_cells(self, length, heads) / (length * heads)

    def draw(self, length: int, head: int = 0) -> str:
        """Text raster, one line a query: ``x`` where the key is visible, ``.`` where not."""
        return "\n".join("".join(".x"[seen] for seen in row) for row in self.dense(length, head))

    @functools.lru_cache(maxsize=256)  # noqa: B019 (patterns are small immutable values)
    def bound(self) -> "Pattern":
        """This pattern with all random terms knowing what surrounds them.

        A bound term keeps its surroundings wherever it is put, so that an expression can be taken
        apart and each part still shows what it showed in the whole.
        """
        return self._bind(Surroundings())

    def on_layer(self, layer: int) -> "Pattern":
        """This pattern with random blocks of the layer's own: adds to their ``layer``."""
        return self

    def __and__(self, other: "Pattern") -> "Pattern":
        return And(_operands(And, self, other))

    def __or__(self, other: "Pattern") -> "Pattern":
        return Or(_operands(Or, self, other))

    def _visible(self, i: Tensor, j: Tensor, head: int | Tensor, length: int | None) -> Tensor:
        """``visible`` of a bound pattern; ``head`` may be on any device."""
        raise NotImplementedError

    def _spans(self, grid: Grid) -> Spans:
        """What is known of the tiles of ``grid`` without looking at cells, of a bound pattern.

        Tiles without any token may be given any value.
        """
        raise NotImplementedError

    def _at(self, grid: Grid, key: Tensor) -> Tensor | None:
        """What is known of single tiles (``Spans.key``), or None if no more than ``_spans`` says.

        For what no few steps could tell, such as which narrow tiles a stride skips.
        """
        return None

    def _bind(self, surroundings: "Surroundings") -> "Pattern":
        return self

    def _without_random(self, replacement: "Pattern") -> "Pattern":
        """This pattern with every random term replaced."""
        return self

    def _of_head(self, head: int) -> "Pattern":
        """What a pattern without random terms shows one head."""
        return self


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    sees_itself = True
    shows_past = shows_future = ANY_LENGTH

    def _visible(self, i, j, head, length):
        return torch.ones_like(i + j, dtype=torch.bool)

    def _spans(self, grid):
        return constant(grid, FULL)

    def __repr__(self) -> str:
        return "full()"


@dataclass(frozen=True, repr=False)
class Nothing(Pattern):
    """No cell at all: stands for a random term that another random term looks at."""

    is_causal = True

    def _visible(self, i, j, head, length):
        return torch.zeros_like(i + j, dtype=torch.bool)

    def _spans(self, grid):
        return constant(grid, DEAD)

    def __repr__(self) -> str:
        return "nothing()"


@dataclass(frozen=True)
class Surroundings:
    """What stands around a term in its expression: only random blocks look at it."""

    around: Pattern = Full()  # everything that is &-ed with the term
    beside: Pattern = Nothing()  # everything that is |-ed with the term

    def inside(self, operands: tuple[Pattern, ...], position: int, kind: type) -> "Surroundings":
        """The surroundings of operand number ``position`` of a combination of ``kind``.

        Random terms are drawn independently: to each other they count as everything when &-ed
        and as nothing when |-ed.
        """
        around, beside = self.around, self.beside
        for other in operands[:position] + operands[position + 1 :]:
            if kind is And:
                around = around & other._without_random(Full())
            else:
                beside = beside | other._without_random(Nothing())
        return Surroundings(around, beside)

    @property
    def differ_by_head(self) -> bool:
        return self.around.differs_by_head or self.beside.differs_by_head

    def of_head(self, head: int) -> "Surroundings":
        return Surroundings(self.around._of_head(head), self.beside._of_head(head))


@dataclass(frozen=True, repr=False)
class _Combination(Pattern):
    operands: tuple[Pattern, ...]

    @property
    def differs_by_head(self) -> bool:
        return any(operand.differs_by_head for operand in self.operands)

    @property
    def variants(self) -> int:
        return max(operand.variants for operand in self.operands)

    @functools.cached_property
    def shows_past(self) -> int:
        return self.extreme(operand.shows_past for operand in self.operands)

    @functools.cached_property
    def shows_future(self) -> int:
        return self.extreme(operand.shows_future for operand in self.operands)

    def _visible(self, i, j, head, length):
        seen = (operand._visible(i, j, head, length) for operand in self.operands)
        return functools.reduce(self.join, seen)

    def _spans(self, grid):
        return functools.reduce(self.join, (operand._spans(grid) for operand in self.operands))

    def _at(self, grid, key):
        values = [operand._at(grid, key) for operand in self.operands]
        if all(value is None for value in values):
            return None
        rows = len(grid.heads) * grid.groups * grid.rows
        return functools.reduce(
            self.table,
            (
                operand._spans(grid).repeat(rows).at(key) if value is None else value
                for value, operand in zip(values, self.operands, strict=True)
            ),
        )

    def _bind(self, surroundings):
        return type(self)(
            tuple(
                operand._bind(surroundings.inside(self.operands, n, type(self)))
                for n, operand in enumerate(self.operands)
            )
        )

    def _without_random(self, replacement):
        return type(self)(tuple(p._without_random(replacement) for p in self.operands))

    def _of_head(self, head):
        return type(self)(tuple(p._of_head(head) for p in self.operands))

    def on_layer(self, layer):
        return type(self)(tuple(p.on_layer(layer) for p in self.operands))

    def __repr__(self) -> str:
        # `&` binds tighter than `|`, so only an Or inside an And needs parentheses.
        needs_parentheses = isinstance(self, And)
        texts = (
            f"({p!r})" if needs_parentheses and isinstance(p, Or) else repr(p)
            for p in self.operands
        )
        return f" {self.symbol} ".join(texts)


class And(_Combination):
    """Visible where every operand is."""

    symbol, join, table = "&", staticmethod(operator.and_), AND
    extreme = staticmethod(min)  # of lengths that all operands reach

    @functools.cached_property
    def is_causal(self) -> bool:
        return any(operand.is_causal for operand in self.operands)

    @property
    def sees_itself(self) -> bool:
        return all(operand.sees_itself for operand in self.operands)

    def _spans(self, grid):
        spans = super()._spans(grid)
        if grid.unit and self.sees_itself:
            # Two terms that each show part of a tile may have no cell in common, but on the
            # diagonal they do: this spares a look at the cells of every tile there.
            spans = spans.combine(meeting(grid, LIVE, UNKNOWN), KNOWING)
        return spans


class Or(_Combination):
    """Visible where any operand is."""

    symbol, join, table = "|", staticmethod(operator.or_), OR
    extreme = staticmethod(max)

    @functools.cached_property
    def is_causal(self) -> bool:
        return all(operand.is_causal for operand in self.operands)

    @property
    def sees_itself(self) -> bool:
        return any(operand.sees_itself for operand in self.operands)


@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Visible where the operand is not: what one pass over a pattern leaves to another."""

    operand: Pattern

    @property
    def differs_by_head(self) -> bool:
        return self.operand.differs_by_head

    @property
    def variants(self) -> int:
        return self.operand.variants

    def _visible(self, i, j, head, length):
        return ~self.operand._visible(i, j, head, length)

    def _spans(self, grid):
        return ~self.operand._spans(grid)

    def _at(self, grid, key):
        value = self.operand._at(grid, key)
        return None if value is None else NOT(value)

    def _bind(self, surroundings):
        return Not(self.operand._bind(surroundings))

    def _without_random(self, replacement):
        opposite = Nothing() if replacement == Full() else Full()
        return Not(self.operand._without_random(opposite))

    def _of_head(self, head):
        return Not(self.operand._of_head(head))

    def on_layer(self, layer):
        return Not(self.operand.on_layer(layer))

    def __repr__(self) -> str:
        combined = isinstance(self.operand, _Combination)
        return f"~({self.operand!r})" if combined else f"~{self.operand!r}"


def _operands(kind: type, *patterns: Pattern) -> tuple[Pattern, ...]:
    """``a & (b & c)`` and ``(a & b) & c`` are one combination of three."""
    flat: list[Pattern] = []
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"only patterns combine with & and |, got {pattern!r}")
        flat += pattern.operands if isinstance(pattern, kind) else (pattern,)
    return tuple(flat)
