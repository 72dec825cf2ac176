"""Patterns as text: what constructs a term, and reading an expression of terms back."""

import ast
from collections.abc import Callable

from kernels.patterns.algebra import Pattern

_CONSTRUCTORS: dict[str, Callable[..., Pattern]] = {}


def constructor(function: Callable[..., Pattern]) -> Callable[..., Pattern]:
    """Let `parse` know a function that makes a term, by the function's name."""
    _CONSTRUCTORS[function.__name__] = function
    return function


def at_least(least: int, given: str, bits: int = 31, **numbers: int) -> None:
    """Refuse numbers of a term that are too small, or too large for kernels.

    Raises:
        TypeError: if one of them is not a whole number.
        ValueError: if one of them is below ``least``, or not below ``2**bits``.
    """
    for name, value in numbers.items():
        if type(value) is not int:  # nor True, which is no size
            raise TypeError(f"{name} must be a whole number, got {given}")
        if not least <= value < 2**bits:
            raise ValueError(f"{name} must be at least {least} and below 2**{bits}, got {given}.")


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


def _argument(node: ast.expr) -> int | str | tuple | Pattern:
    match node:
        case ast.Tuple(elts=elements):
            return tuple(map(_argument, elements))
        case ast.Call() | ast.BinOp():
            return _build(node)
        case ast.Constant(value=int() | str() as value) if type(value) is not bool:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
            return -value
    raise TypeError(f"{ast.unparse(node)} is not a whole number")
