"""Patterns and how they combine: ``&``, ``|``, and what a term is surrounded by."""

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 256  # rows that are evaluated at once where all cells of a pattern are visited


class Pattern:
    """A set of visible cells ``(i, j)``, possibly another one in every head."""

    differs_by_head = False  # True if heads may see different keys
    is_causal = False  # True if it is certain that no query sees a later key

    def visible(self, i: Tensor, j: Tensor, head: int | Tensor = 0, *, length=None) -> Tensor:
        """Whether query ``i`` sees key ``j``: the definition, elementwise.

        Args:
            i, j: positions, integer tensors that broadcast against each other.
            head: head index, an int or a tensor on the CPU that broadcasts against ``i`` and ``j``.
            length: number of tokens; only bidirectional random blocks depend on it.

        Raises:
            ValueError: if the pattern depends on ``length`` and none was given.
        """
        return self._visible(i, j, head, length, Surroundings())

    def dense(self, length: int, head: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """All cells, ``(length, length)`` bool: the oracle of tests, quadratic in memory."""
        position = torch.arange(length, device=device)
        seen = self.visible(position[:, None], position[None, :], head, length=length)
        return seen.expand(length, length)

    @functools.lru_cache(maxsize=256)  # noqa: B019 (patterns are small immutable values)
    def keys_per_query(self, length: int, heads: int = 1) -> float:
        """Mean number of visible keys over the queries and heads: the honest cost.

        Visits every cell in O(``length``) memory; 1 s for 8,192 tokens and one head on a laptop.
        """
        heads = heads if self.differs_by_head else 1
        j, cells = torch.arange(length)[None, :], 0
        for head in range(heads):
            for i in torch.arange(length)[:, None].split(_ROWS):
                seen = self.visible(i, j, head, length=length)
                cells += int(seen.expand(len(i), length).sum())
        return cells / (length * heads)

    def draw(self, length: int, head: int = 0) -> str:
        """Text raster, one line a query: ``x`` where the key is visible, ``.`` where not."""
        return "\n".join("".join(".x"[seen] for seen in row) for row in self.dense(length, head))

    def __and__(self, other: "Pattern") -> "Pattern":
        return And(_operands(And, self, other))

    def __or__(self, other: "Pattern") -> "Pattern":
        return Or(_operands(Or, self, other))

    def _visible(self, i, j, head, length, surroundings: "Surroundings") -> Tensor:
        raise NotImplementedError

    def _without_random(self, replacement: "Pattern") -> "Pattern":
        """This pattern with every random term replaced."""
        return self


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    def _visible(self, i, j, head, length, surroundings):
        return torch.ones_like(i + j, dtype=torch.bool)

    def __repr__(self) -> str:
        return "full()"


@dataclass(frozen=True, repr=False)
class Nothing(Pattern):
    """No cell at all: stands for a random term that another random term looks at."""

    is_causal = True

    def _visible(self, i, j, head, length, surroundings):
        return torch.zeros_like(i + j, dtype=torch.bool)


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


@dataclass(frozen=True, repr=False)
class _Combination(Pattern):
    operands: tuple[Pattern, ...]

    @property
    def differs_by_head(self) -> bool:
        return any(operand.differs_by_head for operand in self.operands)

    def _visible(self, i, j, head, length, surroundings):
        seen = [
            operand._visible(i, j, head, length, surroundings.inside(self.operands, n, type(self)))
            for n, operand in enumerate(self.operands)
        ]
        return functools.reduce(self.join, seen)

    def _without_random(self, replacement):
        return type(self)(tuple(p._without_random(replacement) for p in self.operands))

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

    @property
    def is_causal(self) -> bool:
        return any(operand.is_causal for operand in self.operands)


class Or(_Combination):
    """Visible where any operand is."""

    symbol, join = "|", staticmethod(operator.or_)

    @property
    def is_causal(self) -> bool:
        return all(operand.is_causal for operand in self.operands)


def _operands(kind: type, *patterns: Pattern) -> tuple[Pattern, ...]:
    """``a & (b & c)`` and ``(a & b) & c`` are one combination of three."""
    flat: list[Pattern] = []
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"only patterns combine with & and |, got {pattern!r}")
        flat += pattern.operands if isinstance(pattern, kind) else (pattern,)
    return tuple(flat)
