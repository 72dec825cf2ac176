"""The rule of a pattern inside a kernel: Triton functions of its structure, and a table of numbers.

Only the *structure* of an expression is compiled: ``causal() & window(512)`` and
``causal() & window(64)`` share one kernel, since a window's size is read from the table, by head.

A rule is two functions. ``read(at)`` loads its numbers from the address ``at``, once a program;
``seen(i, j, numbers)`` takes positions ``i (M, 1)`` and ``j (1, N)`` int32, or transposed. What is
long (a random plan) stands behind all short numbers; its address is one of them.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.interpreter import INTERPRETED
from kernels.patterns import terms
from kernels.patterns.algebra import And, Full, Not, Nothing, Or, Pattern

# Interpreted, a function that is captured by another must be plain Python.
_jit = (lambda function: function) if INTERPRETED else triton.jit
_constant = (lambda value: value) if INTERPRETED else tl.constexpr


@dataclass(frozen=True)
class Rule:
    """A compiled structure: ``read(at)``, ``seen(i, j, numbers)``, how many numbers it reads."""

    read: Callable
    seen: Callable
    numbers: int


def rule_of(pattern: Pattern) -> Rule:
    """The rule of a bound pattern; equal structures give the same object."""
    return _rule(_structure(pattern))


def table_of(pattern: Pattern, length: int, heads: int, device: torch.device) -> Tensor:
    """The numbers that the rule of a bound pattern reads, int32 ``(heads or 1, numbers)``.

    Args:
        length: tokens of the sequence; random plans cover it.
        heads: heads of the model; one row serves all if they do not differ.
    """
    rows = []
    for head in range(heads if pattern.differs_by_head else 1):
        short, long = [], []
        _collect(pattern, length, heads, head, short, long)
        behind = len(short)
        for first, values in long:
            short[first + 2] = behind - first
            behind += len(values)
        values = torch.tensor(short, dtype=torch.int32)
        rows.append(torch.cat([values, *(v.int() for _, v in long)]))
    widest = max(1, *(len(row) for row in rows))
    table = torch.zeros(len(rows), widest, dtype=torch.int32)
    for n, row in enumerate(rows):
        table[n, : len(row)] = row
    return table.to(device)


# ------------------------------------------------------------------------------ structure


def _structure(pattern: Pattern) -> tuple:
    """What is compiled: kinds of terms and how they combine, as nested tuples."""
    match pattern:
        case And() | Or():
            kind = "and" if isinstance(pattern, And) else "or"
            return (kind, *map(_structure, pattern.operands))
        case Not():
            return ("not", _structure(pattern.operand))
        case terms.PerHead():
            variants = tuple(map(_structure, pattern.patterns))
            if len(set(variants)) == 1:
                return variants[0]
            return ("or", *(("chosen", variant) for variant in variants))
        case terms.Window():
            return ("window",) if pattern.block == 1 else ("block_window",)
        case terms.RandomBlocks():
            return ("random_blocks", pattern.count)
    return (_TERMS[type(pattern)],)


def _collect(pattern, length, heads, head, short: list, long: list) -> None:
    """Append the numbers of one head in the order in which the rule reads them."""
    match pattern:
        case And() | Or():
            for operand in pattern.operands:
                _collect(operand, length, heads, head, short, long)
        case Not():
            _collect(pattern.operand, length, heads, head, short, long)
        case terms.PerHead(patterns=variants):
            own = variants[head % len(variants)]
            if len(set(map(_structure, variants))) == 1:
                _collect(own, length, heads, head, short, long)
                return
            for n, variant in enumerate(variants):
                short.append(int(n == head % len(variants)))
                _collect(variant, length, heads, head, short, long)
        case terms.Window():
            short += [pattern.left, pattern.right, pattern.block]
        case terms.Dilated():
            short += [pattern.left, pattern.right, pattern.step]
        case terms.Strided():
            short.append(pattern.stride)
        case terms.Fixed(length=l, cells=c) | terms.Summary(length=l, cells=c):
            last = l - c * pattern.sub_block
            short += [l, last - c, last]
        case terms.GlobalTokens():
            short.append(pattern.count)
        case terms.Blocks():
            cells = torch.tensor([[cell == "x" for cell in row] for row in pattern.layout])
            long.append((len(short), cells.flatten()))
            short += [pattern.block, len(cells), 0]
        case terms.RandomBlocks():
            plan = pattern.plan(heads, length)[head].cpu()
            long.append((len(short), plan.flatten()))
            short += [pattern.block, len(plan), 0]


# ------------------------------------------------------------------------------ composition
# Triton looks a captured name up at module level first: none of left_read, left_seen, right_read,
# right_seen, right_at, inner_read, inner_seen and draws may stand there.


@functools.cache
def _rule(structure: tuple) -> Rule:
    kind, *operands = structure
    if kind in ("and", "or"):
        left, right = (kind, *operands[:-1]) if len(operands) > 2 else operands[0], operands[-1]
        return _join(structure, _rule(left), _rule(right))
    if kind == "not":
        return _outside(structure, _rule(operands[0]))
    if kind == "chosen":
        return _chosen(structure, _rule(operands[0]))
    if kind == "random_blocks":
        return _random_blocks(structure, operands[0])
    return _LEAVES[kind]


def _named(structure: tuple) -> Callable:
    """Decorate a function that is made here with a name of its own.

    Inside a kernel Triton tells functions apart by their names and the types of their arguments:
    two rules of one name would silently be the same.
    """
    digest = hashlib.sha256(repr(structure).encode()).hexdigest()[:16]

    def decorate(function):
        function.__qualname__ = f"{function.__name__}_{digest}"
        return _jit(function)

    return decorate


def _join(structure: tuple, left: Rule, right: Rule) -> Rule:
    left_read, left_seen, right_read, right_seen = left.read, left.seen, right.read, right.seen
    right_at = _constant(left.numbers)

    @_named(structure)
    def read(at):
        return left_read(at), right_read(at + right_at)

    @_named(structure)
    def both(i, j, numbers):
        return left_seen(i, j, numbers[0]) & right_seen(i, j, numbers[1])

    @_named(structure)
    def either(i, j, numbers):
        return left_seen(i, j, numbers[0]) | right_seen(i, j, numbers[1])

    seen = both if structure[0] == "and" else either
    return Rule(read, seen, left.numbers + right.numbers)


def _outside(structure: tuple, inner: Rule) -> Rule:
    inner_seen = inner.seen

    @_named(structure)
    def outside(i, j, numbers):
        return inner_seen(i, j, numbers) == 0

    return Rule(inner.read, outside, inner.numbers)


def _chosen(structure: tuple, inner: Rule) -> Rule:
    """One of several patterns, for the heads whose first number is not 0."""
    inner_read, inner_seen = inner.read, inner.seen

    @_named(structure)
    def read(at):
        return tl.load(at) != 0, inner_read(at + 1)

    @_named(structure)
    def chosen(i, j, numbers):
        return inner_seen(i, j, numbers[1]) & numbers[0]

    return Rule(read, chosen, inner.numbers + 1)


def _random_blocks(structure: tuple, count: int) -> Rule:
    draws = _constant(count)

    @_named(structure)
    def random_blocks(i, j, numbers):
        block, rows, plan = numbers
        i_block, j_block = i // block, j // block
        seen = (i_block < 0) & (j_block < 0)
        for n in tl.static_range(draws):
            drawn = tl.load(plan + i_block * draws + n, mask=i_block < rows, other=-1)
            seen = seen | (drawn == j_block)
        return seen

    return Rule(_three_and_behind, random_blocks, 3)


# ------------------------------------------------------------------------------ terms


@_jit
def _none(at):
    return 0


@_jit
def _one(at):
    return tl.load(at)


@_jit
def _three(at):
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@_jit
def _three_and_behind(at):
    """Two numbers, and the address of what stands behind all numbers."""
    return tl.load(at), tl.load(at + 1), at + tl.load(at + 2)


@_jit
def _full(i, j, numbers):
    return (i == i) & (j == j)


@_jit
def _nothing(i, j, numbers):
    return (i != i) & (j != j)


@_jit
def _causal(i, j, numbers):
    return j <= i


@_jit
def _others(i, j, numbers):
    return i != j


@_jit
def _window(i, j, numbers):
    left, right, _ = numbers
    distance = i - j
    return (distance <= left) & (distance >= -right)


@_jit
def _block_window(i, j, numbers):
    left, right, block = numbers
    distance = i // block - j // block
    return (distance <= left) & (distance >= -right)


@_jit
def _dilated(i, j, numbers):
    left, right, step = numbers
    distance = i - j
    near = (distance <= left * step) & (distance >= -right * step)
    return near & (distance % step == 0)


@_jit
def _strided(i, j, stride):
    return (i - j) % stride == 0


@_jit
def _fixed(i, j, numbers):
    block, first, last = numbers
    cell = j % block
    return (i // block == j // block) | ((cell >= first) & (cell < last))


@_jit
def _summary(i, j, numbers):
    block, first, last = numbers
    cell = j % block
    return (i == i) & (cell >= first) & (cell < last)


@_jit
def _global_tokens(i, j, count):
    return (i < count) | (j < count)


@_jit
def _blocks(i, j, numbers):
    block, rows, cells = numbers
    i_block, j_block = i // block, j // block
    inside = (i_block < rows) & (j_block < rows)
    return tl.load(cells + i_block * rows + j_block, mask=inside, other=0) != 0


_LEAVES = {
    "full": Rule(_none, _full, 0),
    "nothing": Rule(_none, _nothing, 0),
    "causal": Rule(_none, _causal, 0),
    "others": Rule(_none, _others, 0),
    "window": Rule(_three, _window, 3),
    "block_window": Rule(_three, _block_window, 3),
    "dilated": Rule(_three, _dilated, 3),
    "strided": Rule(_one, _strided, 1),
    "fixed": Rule(_three, _fixed, 3),
    "summary": Rule(_three, _summary, 3),
    "global_tokens": Rule(_one, _global_tokens, 1),
    "blocks": Rule(_three_and_behind, _blocks, 3),
}
_TERMS = {
    Full: "full",
    Nothing: "nothing",
    terms.Causal: "causal",
    terms.Others: "others",
    terms.Dilated: "dilated",
    terms.Strided: "strided",
    terms.Fixed: "fixed",
    terms.Summary: "summary",
    terms.GlobalTokens: "global_tokens",
    terms.Blocks: "blocks",
}
