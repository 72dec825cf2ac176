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

from kernels.algebra import Full, Pattern
from kernels.terms import Causal, GlobalTokens, RandomBlocks, Window

__all__ = [
    "Pattern",
    "causal",
    "full",
    "global_tokens",
    "parse",
    "random_blocks",
    "window",
]


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
