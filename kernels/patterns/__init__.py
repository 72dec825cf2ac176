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
from collections.abc import Sequence

from torch import Tensor

from kernels.patterns.algebra import Full, Pattern
from kernels.patterns.terms import (
    Blocks,
    Causal,
    Dilated,
    Fixed,
    GlobalTokens,
    Others,
    PerHead,
    RandomBlocks,
    Strided,
    Summary,
    Window,
)

__all__ = [
    "Pattern",
    "blocks",
    "causal",
    "dilated",
    "fixed",
    "full",
    "global_tokens",
    "others",
    "parse",
    "per_head",
    "random_blocks",
    "strided",
    "summary",
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
    _at_least(1, f"window(..., block={block})", block=block)
    if right is None:
        _at_least(1, f"window({left})", keys=left)
        return Window(left - 1, 0, block)
    _at_least(0, f"window({left}, {right})", left=left, right=right)
    return Window(left, right, block)


def dilated(left: int, right: int, step: int | None = None) -> Pattern:
    """A window with gaps: every ``step``-th key.

    ``dilated(w, d)``: ``i - j`` is one of ``0, d, 2 d, ... (w - 1) d``.
    ``dilated(left, right, d)``: ``j = i + m d`` with ``-left <= m <= right``.

    Raises:
        ValueError: if a size is negative, the step 0, or ``dilated(w, d)`` would see nothing.

    Source:
        Longformer, Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
    """
    if step is None:
        _at_least(1, f"dilated({left}, {right})", keys=left, step=right)
        return Dilated(left - 1, 0, right)
    given = f"dilated({left}, {right}, {step})"
    _at_least(0, given, left=left, right=right)
    _at_least(1, given, step=step)
    return Dilated(left, right, step)


def strided(stride: int) -> Pattern:
    """Visible when ``i - j`` is a multiple of ``stride``: the column part alone.

    The pattern of the paper is ``causal() & (window(l) | strided(l))``, here with ``l`` keys in
    the window as in the released code; the text of the paper has ``l + 1``.

    Raises:
        ValueError: if ``stride`` is not positive.

    Source:
        Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    _at_least(1, f"strided({stride})", stride=stride)
    return Strided(stride)


def fixed(length: int, cells: int, sub_block: int = 0) -> Pattern:
    """Visible when the key is in the query's block, or a summary cell of its own block.

    Blocks have ``length`` tokens; the summary cells of each are ``cells`` neighbours, the last ones
    or, with ``sub_block=s``, those that stand ``s * cells`` before. The paper's pattern is
    ``causal() & fixed(length, cells)``; its heads use sub-blocks of their own.

    Raises:
        ValueError: if a size is out of range, or a block is too short for the sub-block.

    Source:
        Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    return Fixed(*_summary_sizes("fixed", length, cells, sub_block))


def summary(length: int, cells: int, sub_block: int = 0) -> Pattern:
    """Visible when the key is a summary cell of its block: the second part of `fixed` alone.

    ``fixed(l, c)`` is ``window(1, block=l) | summary(l, c)``.

    Raises:
        ValueError: if a size is out of range, or a block is too short for the sub-block.

    Source:
        Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    return Summary(*_summary_sizes("summary", length, cells, sub_block))


def _summary_sizes(term: str, length: int, cells: int, sub_block: int) -> tuple[int, int, int]:
    given = f"{term}({length}, {cells}, sub_block={sub_block})"
    _at_least(1, given, length=length, cells=cells)
    _at_least(0, given, sub_block=sub_block)
    if cells * (sub_block + 1) > length:
        raise ValueError(f"cells * (sub_block + 1) must not exceed length, got {given}.")
    return length, cells, sub_block


def global_tokens(count: int) -> Pattern:
    """Visible when ``i < count`` or ``j < count``: the first tokens see all and are seen by all.

    Raises:
        ValueError: if ``count`` is not positive.
    """
    _at_least(1, f"global_tokens({count})", count=count)
    return GlobalTokens(count)


def blocks(layout: Tensor | str | Sequence[Sequence], block: int) -> Pattern:
    """Any given layout: visible when ``layout[i // block][j // block]``; nothing beyond it.

    Args:
        layout: ``(N, N)`` bool tensor, nested sequence of truth values, or rows of ``x`` and ``.``
            (a sequence, or one text with ``/`` or new lines between them, as ``draw`` gives it).
        block: tokens of a block.

    Raises:
        ValueError: if the layout is empty or not square, or ``block`` is not positive.
    """
    _at_least(1, f"blocks(..., block={block})", block=block)
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


def others() -> Pattern:
    """Visible when ``i != j``."""
    return Others()


def per_head(*patterns: Pattern) -> Pattern:
    """Head ``h`` sees ``patterns[h % len(patterns)]``.

    Raises:
        ValueError: if there is no pattern.
        TypeError: if one of them is something else.
    """
    if not patterns:
        raise ValueError("per_head needs at least one pattern, got none.")
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"per_head takes patterns, got {pattern!r}")
    return PerHead(patterns)


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
    _at_least(1, f"random_blocks({count})", count=count)
    _at_least(1, f"random_blocks(..., block={block})", block=block)
    _at_least(-(2**63), f"random_blocks(..., seed={seed}, layer={layer})", seed=seed, layer=layer)
    return RandomBlocks(count, block, seed, layer)


def _at_least(least: int, given: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if type(value) is not int:  # nor True, which is no size
            raise TypeError(f"{name} must be a whole number, got {given}")
        if not least <= value < 2**63:  # positions are 64-bit integers
            raise ValueError(f"{name} must be at least {least} and fit in 64 bits, got {given}.")


_TERMS = (
    causal, full, window, dilated, strided, fixed, summary, global_tokens, random_blocks, blocks,
    others, per_head,
)  # fmt: skip
_CONSTRUCTORS = {term.__name__: term for term in _TERMS}


def parse(text: str) -> Pattern:
    """The pattern that ``text`` describes: calls of the terms, joined by ``&``, ``|`` and brackets.

    Raises:
        ValueError: if the text is not such an expression, or a term refuses its arguments.
    """
    line = " ".join(text.split())
    try:
        return _build(ast.parse(line, mode="eval").body)
    except (SyntaxError, TypeError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(
            f"cannot read the pattern {line!r}: {reason}; write terms such as "
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
            options = {keyword.arg: _argument(keyword.value) for keyword in keywords}
            return _CONSTRUCTORS[name](*map(_argument, args), **options)
    raise TypeError(f"{ast.unparse(node)!r} is not a term")


def _argument(node: ast.expr) -> int | str | Pattern:
    match node:
        case ast.Call() | ast.BinOp():
            return _build(node)
        case ast.Constant(value=int() | str() as value) if type(value) is not bool:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
            return -value
    raise TypeError(f"{ast.unparse(node)} is not a whole number")
