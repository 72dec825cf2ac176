"""From a pattern to passes over disjoint keys, each in the order of tokens that suits it.

A stride or a dilation would touch nearly every tile of the sequence in its own order; among the
tokens of one residue class it is dense. The summary columns of `fixed` are dense once they are
gathered, and so are the rows and columns of `global_at`. So a pattern is split into alternatives,
each is run in the order that suits it, and each excludes what the ones before it have shown: no key
is counted twice.
"""

import functools
from dataclasses import dataclass

from kernels.patterns.algebra import And, Not, Nothing, Pattern
from kernels.patterns.order import SEQUENCE, Listed, Order
from kernels.patterns.terms.full import Full


@dataclass(frozen=True, eq=False)
class Pass:
    """A part of a pattern that one kernel runs: for some heads, with tokens in some order.

    What is kept for a pass (its lists, its rule) is found by the object itself, at no cost.

    Args:
        by_document: every document has tiles of its own, which begin where it does.
    """

    pattern: Pattern
    heads: tuple[int, ...]
    q_order: Order = SEQUENCE
    k_order: Order = SEQUENCE
    by_document: bool = False

    @property
    def covers_keys(self) -> bool:
        """Whether every key is in the storage order, so that its gradient is written."""
        return self.k_order.has_all

    @property
    def covers_queries(self) -> bool:
        """Whether every query is in the storage order, so that its output is written."""
        return self.q_order.has_all


@functools.lru_cache(maxsize=512)
def chains(pattern: Pattern, heads: int, packed: bool = False) -> tuple[tuple[Pass, ...], ...]:
    """Passes of a pattern in chains: each head is in one chain, and runs its passes in order.

    The keys of the passes of a chain are disjoint, and together they are the pattern.

    Args:
        packed: rows may hold several documents, from whose starts positions count.
    """
    pattern, split = pattern.bound(), _split_packed if packed else _split
    heads_of: dict[tuple[Pattern, ...], list[int]] = {}
    for head in range(heads):
        heads_of.setdefault(tuple(split(pattern.of_head(head))), []).append(head)
    # Heads that differ in their numbers alone share a launch.
    if all(len(parts) == 1 and parts[0][1] == Pattern.order for parts in heads_of):
        return ((_pass(pattern, tuple(range(heads)), Pattern.order, packed),),)
    return tuple(
        tuple(_pass(part, tuple(own), order, packed) for part, order in parts)
        for parts, own in heads_of.items()
    )


def completed(chain: tuple[Pass, ...], num_queries: int, num_keys: int) -> tuple[Pass, ...]:
    """The passes of a chain that have tokens, the first and the last of which cover all queries.

    The first one begins the results of every query, and the last one rounds them. Where there is
    none, a pass that shows nothing does.
    """
    exist = [p for p in chain if p.q_order.longest(num_queries) and p.k_order.longest(num_keys)]
    some = [pass_ for pass_ in exist if not pass_.covers_queries]
    every = [pass_ for pass_ in exist if pass_.covers_queries]
    missing = (2 if some else 1) - len(every)
    every += [Pass(Nothing(), chain[0].heads)] * missing
    return (every[0], *some, *every[1:])


@functools.lru_cache(maxsize=512)
def in_one_pass(pattern: Pattern, heads: int) -> tuple[tuple[Pass, ...], ...]:
    """The pattern in one pass, for callers that bring a tile list of their own."""
    return ((Pass(pattern.bound(), tuple(range(heads))),),)


def _pass(pattern: Pattern, heads: tuple[int, ...], order, packed: bool) -> Pass:
    # A residue class of the row serves all documents, as long as distances alone count.
    return Pass(pattern, heads, *order, by_document=packed and order[0].residues == 1)


def _split(pattern: Pattern) -> list[tuple[Pattern, tuple[Order, Order]]]:
    """Disjoint parts whose union is the pattern, and the orders of queries and keys of each.

    What runs in the order of the text comes first.
    """
    own = [part for part in pattern.alternatives if part.order == Pattern.order]
    moved = [part for part in pattern.alternatives if part.order != Pattern.order]
    if not moved:
        return [(pattern, Pattern.order)]
    together = [functools.reduce(Pattern.__or__, own)] if own else []
    first = [(part, Pattern.order) for part in together]
    return first + [(part, part.order) for part in _disjoint(moved, own)]


def _split_packed(pattern: Pattern) -> list[tuple[Pattern, tuple[Order, Order]]]:
    """The same for rows of several documents.

    Residue classes are those of the row, which serve every document alike only as long as nothing
    but distances counts. So these parts come first, and what counts positions excludes them. A list
    of tokens is another one in every document.
    """
    residues, own, gathered = [], [], []
    for part in pattern.alternatives:
        if part.order == Pattern.order or any(isinstance(x, Listed) for x in part.order):
            own.append(part)
        elif part.order[0].residues == 1:
            gathered.append(part)
        else:
            (residues if part.knows_distance_only else own).append(part)
    if not residues and not gathered:
        return [(pattern, Pattern.order)]
    first = [(part, part.order) for part in _disjoint(residues, [])]
    together = [functools.reduce(Pattern.__or__, own)] if own else []
    second = [(part, Pattern.order) for part in _disjoint(together, residues)]
    return first + second + [(part, part.order) for part in _disjoint(gathered, residues + own)]


def _disjoint(parts: list[Pattern], shown: list[Pattern]) -> list[Pattern]:
    """Each part without what is ``shown`` already, and without the parts before it."""
    disjoint = []
    for n, part in enumerate(parts):
        for before in shown + parts[:n]:
            exclusion = _outside(before, part)
            if exclusion not in _factors(part):
                part = part & exclusion
        disjoint.append(part)
    return disjoint


def _outside(excluded: Pattern, part: Pattern) -> Pattern:
    """What excludes ``excluded`` within ``part``: terms that both share need not be asked again."""
    left = [p for p in _factors(excluded) if p not in _factors(part)]
    return Not(functools.reduce(Pattern.__and__, left)) if left else Not(Full())


def _factors(pattern: Pattern) -> tuple[Pattern, ...]:
    """What is &-ed in a pattern."""
    return pattern.operands if isinstance(pattern, And) else (pattern,)
