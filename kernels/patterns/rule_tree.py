"""How a kernel walks through a pattern: the tree of its terms' rules, and the numbers they read.

Only the *structure* of an expression is compiled: ``causal() & window(512)`` and
``causal() & window(64)`` share one kernel, since a window's size is read from a table, by head. A
kernel takes the structure as one constant, ``RULE``: a tree of `Rule` whose leaves hold the Triton
functions of the terms, which are in the files of ``terms/``. Two functions walk through the tree
while the kernel is compiled: ``numbers = read_numbers(at, RULE)``, once a program, and
``is_visible(i, j, numbers, RULE)``.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.interpreter import INTERPRETED
from kernels.patterns.algebra import And, Not, Or, Pattern
from kernels.patterns.terms.per_head import PerHead

# Triton 3.6 does not wrap what it reads from a constant; the interpreter wraps nothing.
_constant = (lambda value: value) if INTERPRETED else tl.constexpr


@dataclass(frozen=True, repr=False)
class Rule:
    """A node of the structure.

    Args:
        kind: "and", "or", "not", "chosen" (in the heads whose first number is not 0) or "term".
        numbers: how many it reads, with those of its parts.
        left, right: its parts.
        function: the Triton function of a term.
        constant: what that is compiled for, or None.
        has_table: the last two numbers of a term are the size of a table and its distance.
    """

    kind: str
    numbers: int
    left: Any = None
    right: Any = None
    function: Any = None
    constant: int | None = None
    has_table: bool = False

    @functools.cached_property
    def cache_key(self) -> str:
        """Of all that is compiled: by this Triton knows a kernel again, also on the disk."""
        function = getattr(self.function, "cache_key", self.function)
        parts = (
            part and (getattr(part, "value", part)).cache_key for part in (self.left, self.right)
        )
        what = (self.kind, self.numbers, function, self.constant, self.has_table, *parts)
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def __hash__(self) -> int:
        return self._hash  # of every launch

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.cache_key)

    def __repr__(self) -> str:
        # Inside a kernel Triton tells functions apart by their names and those of their constants.
        return f"{self.kind}_{self.cache_key[:16]}"


def rule_of(pattern: Pattern) -> Rule:
    """The rule of a bound pattern; equal structures have equal rules."""
    match pattern:
        case And(operands=operands) | Or(operands=operands):
            return functools.reduce(
                functools.partial(_join, pattern.symbol), map(rule_of, operands)
            )
        case Not(operand=operand):
            inner = rule_of(operand)
            return Rule("not", inner.numbers, _constant(inner))
        case PerHead(operands=operands):
            variants = [rule_of(operand) for operand in operands]
            if len(set(variants)) == 1:
                return variants[0]
            chosen = [Rule("chosen", rule.numbers + 1, _constant(rule)) for rule in variants]
            return functools.reduce(functools.partial(_join, "|"), chosen)
    count = len(pattern.numbers) + 2 * pattern.has_table
    function, constant = pattern.rule, pattern.compiled_for
    return Rule("term", count, None, None, function, constant, pattern.has_table)


def _join(symbol: str, left: Rule, right: Rule) -> Rule:
    kind = "and" if symbol == "&" else "or"
    return Rule(kind, left.numbers + right.numbers, _constant(left), _constant(right))


# ------------------------------------------------------------------------------ numbers


def table_of(pattern: Pattern, length: int, heads: int, device: torch.device) -> Tensor:
    """The numbers that the rule of a bound pattern reads, int32 ``(heads or 1, numbers)``.

    Tables of terms stand behind all numbers of a row.

    Args:
        length: tokens of the sequence; random draws cover it.
        heads: heads of the model; one row serves all if they do not differ.
    """
    rows = []
    for head in range(heads if pattern.differs_by_head else 1):
        numbers, tables = [], []
        _collect(pattern, length, heads, head, numbers, tables)
        end = len(numbers)
        for place, table in tables:
            numbers[place : place + 2] = [len(table), end - place - 1]
            end += len(table)
        numbers = torch.tensor(numbers, dtype=torch.int32)
        rows.append(torch.cat([numbers, *(table.int() for _, table in tables)]))
    widest = max(1, *(len(row) for row in rows))
    table = torch.zeros(len(rows), widest, dtype=torch.int32)
    for n, row in enumerate(rows):
        table[n, : len(row)] = row
    return table.to(device)


def _collect(pattern: Pattern, length, heads, head, numbers: list, tables: list) -> None:
    """Append the numbers of one head in the order in which the rule reads them."""
    match pattern:
        case PerHead(operands=operands) if len(set(map(rule_of, operands))) == 1:
            own = operands[head % len(operands)]
            _collect(own, length, heads, head, numbers, tables)
        case PerHead(operands=operands):
            for n, operand in enumerate(operands):
                numbers.append(int(n == head % len(operands)))
                _collect(operand, length, heads, head, numbers, tables)
        case Pattern(operands=[_, *_] as operands):
            for operand in operands:
                _collect(operand, length, heads, head, numbers, tables)
        case _:
            numbers += pattern.numbers
            if pattern.has_table:
                tables.append((len(numbers), pattern.table(head, heads, length)))
                numbers += [0, 0]


# ------------------------------------------------------------------------------ inside kernels


@triton.jit
def read_numbers(at, RULE: tl.constexpr):
    """The numbers of a rule from address ``at`` on, in the form that `is_visible` takes."""
    if RULE.kind == "and" or RULE.kind == "or":
        left = read_numbers(at, RULE.left)
        return left, read_numbers(at + RULE.left.numbers, RULE.right)
    elif RULE.kind == "not":
        return read_numbers(at, RULE.left)
    elif RULE.kind == "chosen":
        return tl.load(at) != 0, read_numbers(at + 1, RULE.left)
    elif RULE.has_table:
        return _read_with_table(at, RULE.numbers)
    else:
        return _read(at, RULE.numbers)


@triton.jit
def is_visible(i, j, numbers, RULE: tl.constexpr):
    """Whether ``i (M, 1)`` sees ``j (1, N)``, or transposed: int32 positions."""
    if RULE.kind == "and":
        left = is_visible(i, j, numbers[0], RULE.left)
        return left & is_visible(i, j, numbers[1], RULE.right)
    elif RULE.kind == "or":
        left = is_visible(i, j, numbers[0], RULE.left)
        return left | is_visible(i, j, numbers[1], RULE.right)
    elif RULE.kind == "not":
        return is_visible(i, j, numbers, RULE.left) == 0
    elif RULE.kind == "chosen":
        return is_visible(i, j, numbers[1], RULE.left) & numbers[0]
    elif RULE.constant is None:
        return RULE.function(i, j, numbers)
    else:
        return RULE.function(i, j, numbers, RULE.constant)


@triton.jit
def _read(at, COUNT: tl.constexpr):
    tl.static_assert(COUNT <= 3, "a term has at most three numbers: others belong in its table")
    if COUNT == 0:
        return 0
    elif COUNT == 1:
        return tl.load(at)
    elif COUNT == 2:
        return tl.load(at), tl.load(at + 1)
    else:
        return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _read_with_table(at, COUNT: tl.constexpr):
    """Numbers, the size of a table, and its address, which stands as a distance from itself."""
    tl.static_assert(COUNT <= 4, "a term with a table has at most two numbers beside it")
    last = at + (COUNT - 1)
    address = last + tl.load(last)
    if COUNT == 2:
        return tl.load(at), address
    elif COUNT == 3:
        return tl.load(at), tl.load(at + 1), address
    else:
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), address
