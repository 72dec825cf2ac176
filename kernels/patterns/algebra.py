"""Patterns and how they combine: ``&`` and ``|``.

`Not` and `Nothing` are for passes and draws; they have no text that `parse` reads.
"""

import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.common.interpreter import device_function
from kernels.common.kept import kept
from kernels.patterns.bounds import Box, Known
from kernels.patterns.order import SEQUENCE, Order

ANY_LENGTH = 2**40  # more tokens than any sequence has
LARGEST = 2**31 - 1  # of the positions that kernels count, and of what they compare them with
_ENCODED = 256  # texts are filled up to whole multiples, so that few lengths differ


class Pattern:
    """A set of visible cells ``(i, j)``, possibly another one in every head.

    A pattern is an immutable, hashable value that holds no batch data. A term is a subclass in a
    file of ``kernels/patterns/terms``, which says all that is known of it: what is visible, for
    torch (`_visible`) and inside kernels (`rule`, `numbers`, `table`), what is certain of a box of
    cells (`_known`), and in which order tokens are best stored (`order`).
    """

    differs_by_head = False  # True if heads may see different keys
    variants = 1  # patterns of the longest `per_head` in it
    is_causal = False  # True if it is certain that no query sees a later key
    sees_itself = False  # True if it is certain that every query sees its own position
    past_seen_up_to = 0  # up to this many tokens, every earlier key is certainly visible
    future_seen_up_to = 0  # up to this many tokens, every later key is certainly visible
    knows_distance_only = False  # True if visibility depends on i - j alone
    operands: tuple["Pattern", ...] = ()
    _encoded = None

    # For users

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
    ):
        """The tiles with at least one visible cell, a `TileList`, in the order of the sequence.

        Takes time and memory in proportion to the listed tiles.

        Args:
            length: number of queries.
            tile: tokens of a tile, or of a tile of (queries, keys).
            heads: number of heads; the list has one if they see alike.
            device: where to compute the list.
            keys: number of keys, default ``length``.

        Raises:
            ValueError: if a size is not positive, or is 2**31 or more.
        """
        from kernels.patterns.tiles import list_tiles  # imports this module

        sides = (tile, tile) if isinstance(tile, int) else tuple(tile)
        keys = length if keys is None else keys
        return list_tiles(self, SEQUENCE, SEQUENCE, length, keys, sides, heads, device)

    @kept(maxsize=256)
    def keys_per_query(self, length: int, heads: int = 1) -> float:
        """Mean number of visible keys over the queries and heads: the honest cost.

        Counted exactly, in time in proportion to the live tiles and little memory.

        Raises:
            ValueError: if ``length`` is not positive, or is 2**31 or more.
        """
        from kernels.patterns.tiles import count_cells  # imports this module

        heads = heads if self.differs_by_head else 1
        return count_cells(self, length, heads) / (length * heads)

    def draw(self, length: int, head: int = 0) -> str:
        """Text raster, one line a query: ``x`` where the key is visible, ``.`` where not."""
        return "\n".join("".join(".x"[seen] for seen in row) for row in self.dense(length, head))

    def on_layer(self, layer: int) -> "Pattern":
        """This pattern with random blocks of the layer's own: adds to their ``layer``."""
        return self._map(lambda operand: operand.on_layer(layer))

    def of_head(self, head: int) -> "Pattern":
        """What one head sees: this pattern without `per_head`."""
        return self._map(lambda operand: operand.of_head(head))

    def __and__(self, other: "Pattern") -> "Pattern":
        return And(_flat(And, self, other))

    def __or__(self, other: "Pattern") -> "Pattern":
        return Or(_flat(Or, self, other))

    # For kernels

    @functools.lru_cache(maxsize=256)  # noqa: B019 (patterns are small immutable values)
    def bound(self) -> "Pattern":
        """This pattern with all random terms knowing what surrounds them.

        A bound term keeps its surroundings wherever it is put, so that an expression can be taken
        apart and each part still shows what it showed in the whole.
        """
        from kernels.patterns.terms.random_blocks import bind  # imports this module

        return bind(self)

    @property
    def encoded(self) -> Tensor:
        """The canonical text as bytes, uint8 on the CPU, filled up with spaces; made once.

        What an operator of torch takes: a number or a text would be a constant of the graph that
        `torch.compile` makes, and every layer with a pattern of its own would need its own graph.
        """
        if self._encoded is not None:
            return self._encoded
        if torch.compiler.is_compiling():
            return _bytes(repr(self))
        object.__setattr__(self, "_encoded", _kept_bytes(repr(self)))
        return self._encoded

    # What a term says of itself; of a bound pattern

    order: tuple[Order, Order] = (SEQUENCE, SEQUENCE)  # of queries and keys: where it is dense

    @property
    def alternatives(self) -> tuple["Pattern", ...]:
        """Patterns whose union this is, split where a term wants a storage order of its own."""
        return (self,)

    def _visible(self, i: Tensor, j: Tensor, head: int | Tensor, length: int | None) -> Tensor:
        """``visible``; ``head`` may be on any device."""
        raise NotImplementedError

    def _known(self, box: Box) -> Known:
        """What is certain of boxes without looking at cells."""
        raise NotImplementedError

    def _scattered(self, grid) -> tuple[Tensor, "Pattern"] | None:
        """Tiles that terms touch here and there, and this pattern without these terms.

        Args:
            grid: a `kernels.patterns.grid.Grid`.

        Returns:
            Numbers of tiles ``(N,)`` (see `Grid.number`), ascending, and the pattern; None if there
            is no such term.
        """
        parts = [operand._scattered(grid) for operand in self.operands]
        if all(part is None for part in parts):
            return None
        numbers = [part[0] for part in parts if part is not None]
        number = numbers[0] if len(numbers) == 1 else torch.cat(numbers).unique()
        rest = iter(
            operand if part is None else part[1]
            for operand, part in zip(self.operands, parts, strict=True)
        )
        return number, self._map(lambda operand: next(rest))

    @staticmethod
    def rule(i, j, numbers):
        """A function of Triton: whether ``i (M, 1)`` sees ``j (1, N)``, or transposed, int32.

        ``numbers`` are those that `numbers` gives, and if there is a `table` its size and address
        behind them: a tuple, or the one number that there is. `compiled_for` is a fourth argument.
        """
        raise NotImplementedError

    compiled_for: int | None = None  # a constant of the rule: another one is another kernel

    @property
    def numbers(self) -> tuple[int, ...]:
        """At most three numbers that the rule reads: a kernel serves all sizes of a term."""
        return ()

    has_table = False

    def table(self, head: int, heads: int, length: int) -> Tensor:
        """More numbers, which the rule looks up: one dimension of int32.

        Args:
            head: number of the head that reads it.
            heads: heads of the model.
            length: tokens of the sequence.
        """
        raise NotImplementedError

    def _map(self, function: Callable[["Pattern"], "Pattern"]) -> "Pattern":
        """The same combination of what ``function`` makes of each operand; a term is itself."""
        return type(self)(tuple(map(function, self.operands))) if self.operands else self


@dataclass(frozen=True, repr=False)
class Nothing(Pattern):
    """No cell at all: what is left of a pattern where nothing is."""

    is_causal = knows_distance_only = True

    def _visible(self, i, j, head, length):
        return torch.zeros_like(i + j, dtype=torch.bool)

    def _known(self, box):
        return box.constant(False)

    @staticmethod
    @device_function
    def rule(i, j, numbers):
        return (i != i) & (j != j)

    def __repr__(self) -> str:
        return "nothing()"


@dataclass(frozen=True, repr=False)
class _Combination(Pattern):
    operands: tuple[Pattern, ...]

    @property
    def differs_by_head(self) -> bool:
        return any(operand.differs_by_head for operand in self.operands)

    @property
    def variants(self) -> int:
        return max(operand.variants for operand in self.operands)

    @property
    def knows_distance_only(self) -> bool:
        return all(operand.knows_distance_only for operand in self.operands)

    @functools.cached_property
    def past_seen_up_to(self) -> int:
        return self.extreme(operand.past_seen_up_to for operand in self.operands)

    @functools.cached_property
    def future_seen_up_to(self) -> int:
        return self.extreme(operand.future_seen_up_to for operand in self.operands)

    def _visible(self, i, j, head, length):
        seen = (operand._visible(i, j, head, length) for operand in self.operands)
        return functools.reduce(self.join, seen)

    def _known(self, box):
        return functools.reduce(self.join, (operand._known(box) for operand in self.operands))

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

    symbol, join = "&", staticmethod(operator.and_)
    extreme = staticmethod(min)  # of lengths that all operands reach

    @functools.cached_property
    def is_causal(self) -> bool:
        return any(operand.is_causal for operand in self.operands)

    @property
    def sees_itself(self) -> bool:
        return all(operand.sees_itself for operand in self.operands)

    @functools.cached_property
    def order(self) -> tuple[Order, Order]:
        """That of the first operand which wants one of its own."""
        orders = (operand.order for operand in self.operands)
        return next((own for own in orders if own != Pattern.order), Pattern.order)

    @property
    def alternatives(self) -> tuple[Pattern, ...]:
        choices = itertools.product(*(operand.alternatives for operand in self.operands))
        return tuple(functools.reduce(operator.and_, choice) for choice in choices)

    def _known(self, box):
        known = super()._known(box)
        if not self.sees_itself:
            return known
        # Two boxes of which each shows a cell may have none in common, but on the diagonal they
        # do: this spares a look at the cells of every tile there.
        return replace(known, some=known.some | box.meets_diagonal())


class Or(_Combination):
    """Visible where any operand is."""

    symbol, join = "|", staticmethod(operator.or_)
    extreme = staticmethod(max)

    @functools.cached_property
    def is_causal(self) -> bool:
        return all(operand.is_causal for operand in self.operands)

    @property
    def sees_itself(self) -> bool:
        return any(operand.sees_itself for operand in self.operands)

    @property
    def alternatives(self) -> tuple[Pattern, ...]:
        return tuple(part for operand in self.operands for part in operand.alternatives)


@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Visible where the operand is not: what one pass over a pattern leaves to another."""

    operand: Pattern

    @property
    def operands(self) -> tuple[Pattern]:
        return (self.operand,)

    @property
    def differs_by_head(self) -> bool:
        return self.operand.differs_by_head

    @property
    def variants(self) -> int:
        return self.operand.variants

    @property
    def knows_distance_only(self) -> bool:
        return self.operand.knows_distance_only

    def _visible(self, i, j, head, length):
        return ~self.operand._visible(i, j, head, length)

    def _known(self, box):
        return ~self.operand._known(box)

    def _map(self, function):
        return Not(function(self.operand))

    def __repr__(self) -> str:
        combined = isinstance(self.operand, _Combination)
        return f"~({self.operand!r})" if combined else f"~{self.operand!r}"


def _flat(kind: type, *patterns: Pattern) -> tuple[Pattern, ...]:
    """``a & (b & c)`` and ``(a & b) & c`` are one combination of three."""
    flat: list[Pattern] = []
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"only patterns combine with & and |, got {pattern!r}")
        flat += pattern.operands if isinstance(pattern, kind) else (pattern,)
    return tuple(flat)


def _bytes(text: str) -> Tensor:
    filled = text + " " * (-len(text) % _ENCODED)
    return torch.tensor([ord(letter) for letter in filled], dtype=torch.uint8, device="cpu")


_kept_bytes = kept(maxsize=256)(_bytes)
