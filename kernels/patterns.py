"""The pattern algebra: which key ``j`` a query ``i`` sees, declared once for every use.

    >>> pattern = causal() & (window(2) | global_tokens(1))
    >>> print(pattern.draw(5))
    x....
    xx...
    xxx..
    x.xx.
    x..xx

A pattern is an immutable, hashable value that holds no batch data. ``&`` and ``|`` combine
patterns, ``repr`` is canonical text, and ``parse`` reads that text back (the same grammar in yaml).
"""

import ast
import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.random_plan import draw_blocks

__all__ = [
    "Pattern",
    "causal",
    "full",
    "global_tokens",
    "parse",
    "random_blocks",
    "window",
]

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


@dataclass(frozen=True)
class Surroundings:
    """What stands around a term in its expression: only random blocks look at it."""

    around: Pattern | None = None  # everything that is &-ed with the term; None is everything
    beside: Pattern | None = None  # everything that is |-ed with the term; None is nothing

    def inside(self, operands: tuple[Pattern, ...], position: int, kind: type) -> "Surroundings":
        """The surroundings of operand number ``position`` of a combination of ``kind``.

        Random terms are drawn independently: to each other they count as everything when &-ed
        and as nothing when |-ed.
        """
        others = operands[:position] + operands[position + 1 :]
        if kind is And:
            fixed = And(tuple(p._without_random(Full()) for p in others))
            return Surroundings(fixed if self.around is None else self.around & fixed, self.beside)
        fixed = Or(tuple(p._without_random(_Nothing()) for p in others))
        return Surroundings(self.around, fixed if self.beside is None else self.beside | fixed)


# ---------------------------------------------------------------------------- combinations


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


# ---------------------------------------------------------------------------- terms


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    is_causal = True

    def _visible(self, i, j, head, length, surroundings):
        return j <= i

    def __repr__(self) -> str:
        return "causal()"


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    def _visible(self, i, j, head, length, surroundings):
        return torch.ones_like(i + j, dtype=torch.bool)

    def __repr__(self) -> str:
        return "full()"


@dataclass(frozen=True, repr=False)
class _Nothing(Pattern):
    """No cell at all: stands for a random term that another random term looks at."""

    is_causal = True

    def _visible(self, i, j, head, length, surroundings):
        return torch.zeros_like(i + j, dtype=torch.bool)


@dataclass(frozen=True, repr=False)
class Window(Pattern):
    left: int
    right: int
    block: int

    @property
    def is_causal(self) -> bool:
        return self.right == 0 and self.block == 1

    def _visible(self, i, j, head, length, surroundings):
        distance = _block_of(i, self.block) - _block_of(j, self.block)
        return (distance <= self.left) & (distance >= -self.right)

    def __repr__(self) -> str:
        width = f"{self.left + 1}" if self.right == 0 else f"{self.left}, {self.right}"
        return f"window({width})" if self.block == 1 else f"window({width}, block={self.block})"


@dataclass(frozen=True, repr=False)
class GlobalTokens(Pattern):
    count: int

    def _visible(self, i, j, head, length, surroundings):
        return (i < self.count) | (j < self.count)

    def __repr__(self) -> str:
        return f"global_tokens({self.count})"


@dataclass(frozen=True, repr=False)
class RandomBlocks(Pattern):
    count: int
    block: int
    seed: int = 0
    layer: int = 0

    differs_by_head = True

    def _visible(self, i, j, head, length, surroundings):
        i_block, j_block = _block_of(i, self.block), _block_of(j, self.block)
        heads = int(head.max() if isinstance(head, Tensor) else head) + 1
        plan = self._plan(surroundings, heads, length, i_block)
        head = head.to(i.device) if isinstance(head, Tensor) else head
        drawn = plan[head, i_block]  # (..., count)
        seen = torch.zeros_like(i + j, dtype=torch.bool)
        for n in range(self.count):
            seen = seen | (drawn[..., n] == j_block)
        return seen

    def _plan(self, surroundings: Surroundings, heads: int, length, i_block: Tensor) -> Tensor:
        """The drawn key blocks, ``(heads, query blocks, count)``, -1 where there were too few."""
        around = surroundings.around or Full()
        if around.is_causal:
            # A row does not depend on the length, so that one plan serves many lengths.
            blocks = -(-length // self.block) if length else int(i_block.max()) + 1
            blocks = 1 << (blocks - 1).bit_length()
        elif length is not None:
            blocks = -(-length // self.block)
        else:
            raise ValueError(
                f"{self!r} without causal() depends on the number of tokens, got length=None; "
                f"pass `length`."
            )
        excluded = surroundings.beside or _Nothing()
        return _random_plan(self, around, excluded, heads, blocks, str(i_block.device))

    def _without_random(self, replacement):
        return replacement

    def __repr__(self) -> str:
        options = "".join(f", {k}={v}" for k in ("seed", "layer") if (v := getattr(self, k)))
        return f"random_blocks({self.count}, block={self.block}{options})"


@functools.lru_cache(maxsize=256)
def _random_plan(
    term: RandomBlocks, around: Pattern, excluded: Pattern, heads: int, blocks: int, device: str
) -> Tensor:
    if device != "cpu":
        return _random_plan(term, around, excluded, heads, blocks, "cpu").to(device)
    allowed = _touched_blocks(around, term.block, blocks)
    taken = _touched_blocks(around & excluded, term.block, blocks)
    numbers_in_hash = () if around.is_causal else (blocks,)
    return draw_blocks(
        allowed & ~taken, term.count, heads, (term.seed, term.layer, *numbers_in_hash)
    )


@functools.lru_cache(maxsize=64)
def _touched_blocks(pattern: Pattern, block: int, blocks: int) -> Tensor:
    """Which blocks hold at least one visible cell, ``(query blocks, key blocks)`` bool."""
    j = torch.arange(blocks * block)[None, :]
    rows = []
    for i in torch.arange(blocks * block)[:, None].split(block):
        seen = pattern.visible(i, j, length=blocks * block).expand(block, blocks * block)
        rows.append(seen.any(dim=0).view(blocks, block).any(dim=1))
    return torch.stack(rows)


def _block_of(position: Tensor, block: int) -> Tensor:
    return position if block == 1 else position // block


# ---------------------------------------------------------------------------- constructors


def causal() -> Pattern:
    """Visible when ``j <= i``."""
    return Causal()


def full() -> Pattern:
    """Always visible."""
    return Full()


def window(left: int, right: int | None = None, *, block: int = 1) -> Pattern:
    """A band around the diagonal.

    ``window(w)``: ``0 <= i - j < w``, that is ``w`` keys counting the query itself.
    ``window(left, right)``: ``i - left <= j <= i + right``.
    With ``block=b`` the same rule holds for the block numbers ``i // b`` and ``j // b``: the
    window of BigBird (Zaheer et al. 2020, arXiv:2007.14062, section 2).

    Raises:
        ValueError: if a size is negative, or ``window(w)`` would see nothing.
    """
    _require(block >= 1, "window", f"block={block}", "block must be at least 1")
    if right is None:
        _require(left >= 1, "window", left, "the number of keys must be at least 1")
        return Window(left - 1, 0, block)
    given = f"{left}, {right}"
    _require(left >= 0 and right >= 0, "window", given, "both sides must be 0 or more")
    return Window(left, right, block)


def global_tokens(count: int) -> Pattern:
    """Visible when ``i < count`` or ``j < count``: the first tokens see all and are seen by all.

    Raises:
        ValueError: if ``count`` is not positive.
    """
    _require(count >= 1, "global_tokens", count, "the number of tokens must be at least 1")
    return GlobalTokens(count)


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
        ValueError: if ``count`` or ``block`` is not positive.
    """
    _require(count >= 1, "random_blocks", count, "the number of blocks must be at least 1")
    _require(block >= 1, "random_blocks", f"block={block}", "block must be at least 1")
    return RandomBlocks(count, block, seed, layer)


def _require(condition: bool, term: str, given: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {term}({given}).")


# ---------------------------------------------------------------------------- text

_CONSTRUCTORS = {f.__name__: f for f in (causal, full, window, global_tokens, random_blocks)}


def parse(text: str) -> Pattern:
    """The pattern that ``text`` describes: calls of the terms, joined by ``&``, ``|`` and brackets.

    Raises:
        ValueError: if the text is not such an expression, or a term refuses its arguments.
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError) as error:
        raise ValueError(
            f"cannot read the pattern {text!r}: {error}; write terms such as "
            f"{', '.join(_CONSTRUCTORS)} joined by & and |."
        ) from error


def _build(node: ast.expr) -> Pattern:
    match node:
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _build(left) & _build(right)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _build(left) | _build(right)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            if name not in _CONSTRUCTORS:
                raise TypeError(f"there is no term {name!r}")
            options = {k.arg: _number(k.value) for k in keywords}
            return _CONSTRUCTORS[name](*map(_number, args), **options)
    raise TypeError(f"{ast.unparse(node)!r} is not a term")


def _number(node: ast.expr) -> int:
    value = ast.literal_eval(node)
    if type(value) is not int:
        raise TypeError(f"{ast.unparse(node)} is not a whole number")
    return value
