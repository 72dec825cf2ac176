"""From a pattern to what the kernels run: passes over disjoint keys, tile lists and work items.

A stride or a dilation would touch nearly every tile of the sequence in its own order; among the
tokens of one residue class it is dense. The summary columns of `fixed` are dense once they are
gathered. So a pattern is split into alternatives, each is run in the order that suits it, and each
excludes what the ones before it have shown: no key is counted twice.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.algebra import And, Full, Not, Or, Pattern
from kernels.rules import Rule, rule_of, table_of
from kernels.spans import Order
from kernels.terms import Causal, Dilated, Fixed, Others, PerHead, Strided, Summary, Window
from kernels.tiles import TileList, list_tiles

# A row is cut into pieces of so many mean rows, but of no fewer tiles than this.
PIECE_ROWS, PIECE_TILES = 2, 16
ROWS_ON_CPU = 8192  # tiles of queries; a longer list is built on the device of the kernel


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


# ------------------------------------------------------------------------------ work items


@dataclass(frozen=True, eq=False)
class Work:
    """A tile list as a kernel reads it: items for its programs, and the entries that they visit.

    Args:
        items: ``(heads or 1, work, 4)`` int32: row, first and last entry, and a slot for the result
            of a piece of a row (-1 for a whole row). Rows and slots are the same in every head.
        cut: ``(cut rows, 3)`` int32: row, first slot, pieces.
        slots: pieces of all cut rows.
        entries: tile number times two, plus one if the whole tile is visible, int32; one more at
            the end, because kernels read an entry ahead.
        rows: tiles of one group.
        tile_rows: rows of the list, over the groups and heads.
    """

    items: Tensor
    cut: Tensor
    slots: int
    entries: Tensor
    rows: int
    tile_rows: int

    def __len__(self) -> int:
        """Programs of one batch and head."""
        return self.items.shape[1]

    @property
    def cuts(self) -> int:
        """Rows that are cut."""
        return len(self.cut)

    @property
    def differs_by_head(self) -> bool:
        return len(self.items) > 1

    @property
    def mean_tiles(self) -> float:
        """Tiles that a row visits."""
        return (len(self.entries) - 1) / self.tile_rows


def make_work(tiles: TileList, device: torch.device) -> Work:
    """Cut rows with many tiles into pieces, longest rows first."""
    total, heads = tiles.shape[0], tiles.heads
    start = tiles.offsets[:-1].view(heads, total).long()
    count = tiles.offsets.diff().view(heads, total)
    longest = count.amax(dim=0)
    most = max(PIECE_TILES, PIECE_ROWS * (len(tiles) // (total * heads) + 1))
    row = longest.argsort(descending=True, stable=True)
    pieces = ((longest[row] + most - 1) // most).clamp(min=1)
    slots = torch.where(pieces > 1, pieces, 0).cumsum(0)
    first_slot = torch.where(pieces > 1, slots - pieces, -1)
    cut = torch.stack((row, first_slot, pieces), dim=1)[pieces > 1]
    which = torch.repeat_interleave(pieces)
    piece = torch.arange(len(which), device=row.device) - (pieces.cumsum(0) - pieces)[which]
    row, pieces, first_slot = row[which], pieces[which], first_slot[which]
    slot = torch.where(first_slot < 0, -1, first_slot + piece)
    low = start[:, row] + count[:, row] * piece // pieces
    high = start[:, row] + count[:, row] * (piece + 1) // pieces
    shared = (x.expand(heads, -1) for x in (row, slot))
    items = torch.stack((next(shared), low, high, next(shared)), dim=2)
    entries = torch.nn.functional.pad(tiles.keys * 2 + tiles.full, (0, 1))
    return Work(
        items.int().contiguous().to(device),
        cut.int().contiguous().to(device),
        int(slots[-1]),
        entries.int().to(device),
        total // tiles.groups,
        total * heads,
    )


@functools.lru_cache(maxsize=512)
def work_of(
    part: Pass, heads: int, queries: int, keys: int, tile: tuple[int, int], inverse: bool,
    device: torch.device,
) -> Work:  # fmt: skip
    """The work of one pass and direction, kept: every later call costs a look-up.

    Args:
        heads: heads of the model, over which a random plan is drawn.
        tile: tokens of a tile of (queries, keys).
        inverse: rows are tiles of keys, and their lists tiles of queries.
    """
    tiles = _tiles(part, heads, queries, keys, tile, device)
    return make_work(tiles.inverse() if inverse else tiles, device)


@functools.lru_cache(maxsize=64)
def _tiles(part, heads, queries, keys, tile, device) -> TileList:
    small = max(queries // tile[0], keys // tile[1]) <= ROWS_ON_CPU
    where = torch.device("cpu") if small else device
    groups = part.q_order.groups
    orders = part.q_order, part.k_order
    if groups > 1 and _knows_distance_only(part.pattern):
        # The same list in every group; group 0 has the most tokens.
        orders = tuple(replace(order, groups=1) for order in orders)
        one = list_tiles(part.pattern, *orders, queries, keys, tile, heads, where)
        return _repeat(one, groups)
    return list_tiles(part.pattern, *orders, queries, keys, tile, heads, where)


def _knows_distance_only(pattern: Pattern) -> bool:
    """Whether visibility depends on ``i - j`` alone."""
    match pattern:
        case And(operands=operands) | Or(operands=operands):
            return all(map(_knows_distance_only, operands))
        case Not(operand=operand):
            return _knows_distance_only(operand)
        case Window(block=block):
            return block == 1
    return isinstance(pattern, Full | Causal | Strided | Dilated | Others)


def _repeat(tiles: TileList, groups: int) -> TileList:
    """The list of one group, for every group."""
    assert tiles.heads == 1, "what differs by head does not depend on the distance alone"
    count = tiles.offsets.diff().repeat(groups)
    offsets = torch.cat((count.new_zeros(1), count.cumsum(0)))
    shape = (tiles.shape[0] * groups, tiles.shape[1])
    numbers, full = tiles.keys.repeat(groups), tiles.full.repeat(groups)
    return TileList(offsets.int(), numbers, full, shape, tiles.tile, groups)


@functools.lru_cache(maxsize=512)
def rule_and_table(
    part: Pass, heads: int, length: int, device: torch.device
) -> tuple[Rule, Tensor]:
    """What a kernel needs to decide the cells of a partial tile."""
    return rule_of(part.pattern), table_of(part.pattern, length, heads, device)
