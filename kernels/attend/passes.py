"""From a pattern to passes over disjoint keys, each in the order of tokens that suits it.

A stride or a dilation would touch nearly every tile of the sequence in its own order; among the
tokens of one residue class it is dense. The summary columns of `fixed` are dense once they are
gathered. So a pattern is split into alternatives, each is run in the order that suits it, and each
excludes what the ones before it have shown: no key is counted twice.
"""

import functools
import itertools
from dataclasses import dataclass

from kernels.patterns.algebra import And, Full, Not, Or, Pattern
from kernels.patterns.spans import Order
from kernels.patterns.terms import Dilated, Fixed, PerHead, Strided, Summary

SEQUENCE = Order()  # the tokens as they stand


@dataclass(frozen=True, eq=False)
class Pass:
    """A part of a pattern that one kernel runs: for some heads, with tokens in some order.

    What is kept for a pass (its lists, its rule) is found by the object itself, at no cost.
    """

    pattern: Pattern
    heads: tuple[int, ...]
    q_order: Order = SEQUENCE
    k_order: Order = SEQUENCE

    @property
    def covers_keys(self) -> bool:
        """Whether every key is in the storage order, so that its gradient is written."""
        return self.k_order.groups == self.k_order.step


@functools.lru_cache(maxsize=512)
def chains(pattern: Pattern, heads: int) -> tuple[tuple[Pass, ...], ...]:
    """Passes of a pattern in chains: each head is in one chain, and runs its passes in order.

    The keys of the passes of a chain are disjoint, and together they are the pattern.
    """
    pattern = pattern.bound()
    heads_of: dict[tuple[Pattern, ...], list[int]] = {}
    for head in range(heads):
        heads_of.setdefault(tuple(_split(_for_head(pattern, head))), []).append(head)
    if all(map(_is_plain, heads_of)):  # heads that differ in their numbers share a launch
        return ((Pass(pattern, tuple(range(heads))),),)
    return tuple(
        tuple(Pass(part, tuple(own), *_orders(part)) for part in parts)
        for parts, own in heads_of.items()
    )


@functools.lru_cache(maxsize=512)
def whole(pattern: Pattern, heads: int) -> tuple[tuple[Pass, ...], ...]:
    """The pattern in one pass, for callers that bring a tile list of their own."""
    return ((Pass(pattern.bound(), tuple(range(heads))),),)


def _for_head(pattern: Pattern, head: int) -> Pattern:
    """The pattern of one head, without `per_head`."""
    match pattern:
        case PerHead(patterns=patterns):
            return _for_head(patterns[head % len(patterns)], head)
        case And(operands=operands) | Or(operands=operands):
            return type(pattern)(tuple(_for_head(p, head) for p in operands))
        case Not(operand=operand):
            return Not(_for_head(operand, head))
    return pattern


def _is_plain(parts: tuple[Pattern, ...]) -> bool:
    return len(parts) == 1 and _orders(parts[0]) == (SEQUENCE, SEQUENCE)


def _split(pattern: Pattern) -> list[Pattern]:
    """Disjoint parts whose union is the pattern: what runs in the order of the text comes first."""
    alternatives = _alternatives(pattern)
    own = [p for p in alternatives if _orders(p) == (SEQUENCE, SEQUENCE)]
    moved = [p for p in alternatives if p not in own]
    if not moved:
        return [pattern]
    first = [functools.reduce(Pattern.__or__, own)] if own else []
    parts = []
    for n, part in enumerate(moved):
        for before in own + moved[:n]:
            exclusion = _outside(before, part)
            if exclusion not in _factors(part):
                part = part & exclusion
        parts.append(part)
    return first + parts


def _alternatives(pattern: Pattern) -> list[Pattern]:
    """Patterns whose union is the pattern, split where a term asks for an order of its own."""
    match pattern:
        case Or(operands=operands):
            return [part for p in operands for part in _alternatives(p)]
        case And(operands=operands):
            choices = itertools.product(*map(_alternatives, operands))
            return [functools.reduce(Pattern.__and__, choice) for choice in choices]
        case Fixed(local=local):
            return [local, pattern & Not(local)]
    return [pattern]


def _outside(excluded: Pattern, part: Pattern) -> Pattern:
    """What excludes ``excluded`` within ``part``: terms that both share need not be asked again."""
    left = [p for p in _factors(excluded) if p not in _factors(part)]
    return Not(functools.reduce(Pattern.__and__, left)) if left else Not(Full())


def _factors(pattern: Pattern) -> tuple[Pattern, ...]:
    """What is &-ed in a pattern."""
    return pattern.operands if isinstance(pattern, And) else (pattern,)


def _orders(part: Pattern) -> tuple[Order, Order]:
    """The storage orders of queries and keys in which a part is dense."""
    for term in _factors(part):
        match term:
            case Strided(stride=step) | Dilated(step=step) if step > 1:
                return (Order(step=step, groups=step),) * 2
            case Fixed(summary=columns) | (Summary() as columns):
                order = Order(run=columns.cells, step=columns.length, first=columns.first)
                return SEQUENCE, order
    return SEQUENCE, SEQUENCE
