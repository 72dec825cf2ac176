"""Rows that hold several documents: which tiles of which document each program takes.

A pattern counts positions from the start of each document. So a long document is cut into tiles
from its own start on, and visits what one tile list shows of a document as long as the row. Short
documents share the tiles of the row, and see all tiles of their documents, cell by cell. Which
documents there are only the device knows: it plans, and the host gives it room.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attend.passes import Pass
from kernels.attend.setup import Setup
from kernels.common.jit import kernel
from kernels.common.loads import token_of

LONG_ITEM, SHORT_ITEM, CUT = 6, 4, 5  # numbers of an item, and of a row that is cut
_LANES = 256


@dataclass(frozen=True, eq=False)
class Plan:
    """What programs do in each row of documents.

    Args:
        long: ``(B, programs, 6)`` int32: where a document begins, and the limit of it (0: nothing
            to do); row of the list; number of the part that the result is (-1: a whole row); which
            part of how many.
        short: ``(B, room, 4)`` int32: where the own tokens begin, and the limit of them; the same
            of the tokens that their documents have.
        count: how many of these there are, ``(B,)`` int32.
        cut: ``(B, cut rows, 5)`` int32: where a document begins, and the limit of it; row, first
            part, parts; None if no row is cut.
        cuts: how many rows are cut, ``(B,)`` int32.
    """

    long: Tensor
    short: Tensor
    count: Tensor
    cut: Tensor | None
    cuts: Tensor | None


def first_tokens_of(documents: Tensor) -> Tensor:
    """`kernels.common.documents.first_tokens` in one launch."""
    B, L = documents.shape
    starts = documents.new_empty((B, L), dtype=torch.int32)
    first_tokens_kernel[(B,)](documents, starts, L, LANES=1024)
    return starts


def plan_of(setup: Setup, pass_: Pass, starts: Tensor, own_keys: bool) -> Plan:
    """Plan the launches of a pass in one direction.

    Args:
        setup: for long documents.
        starts: the first token of each token's document, ``(B, L)`` int32.
        own_keys: programs own tiles of keys, and visit queries.
    """
    work, C, (B, L) = setup.work, setup.constants, starts.shape
    long = starts.new_empty((B, work.room, LONG_ITEM))
    short = starts.new_empty((B, setup.short.work.room, SHORT_ITEM))
    count = starts.new_empty(B)
    cut = cuts = None
    if work.parts:
        cut, cuts = starts.new_empty((B, work.parts // 2, CUT)), starts.new_empty(B)
    own, other = (C.BLOCK_J, C.BLOCK_I) if own_keys else (C.BLOCK_I, C.BLOCK_J)
    order = pass_.k_order if own_keys else pass_.q_order
    plan_kernel[(B,)](
        starts, long, short, count, cut, cuts, work.longest, L, L.bit_length(), work.short,
        work.most, len(work), setup.short.work.room, work.parts // 2,
        order.run, order.step, order.first,
        ORDER=C.K_ORDER if own_keys else C.Q_ORDER, OWN=own, OTHER=other,
        CAUSAL=pass_.pattern.is_causal, OWN_KEYS=own_keys, LANES=_LANES,
    )  # fmt: skip
    return Plan(long, short, count, cut, cuts)


@kernel
def first_tokens_kernel(documents, starts, length, LANES: tl.constexpr):
    """Where the document of each token of a row begins: where the number last changed."""
    row = tl.program_id(0).to(tl.int64) * length
    begin = 0
    for chunk in range(0, length, LANES):
        token = chunk + tl.arange(0, LANES)
        exists = token < length
        number = tl.load(documents + row + token, mask=exists, other=0)
        before = tl.load(documents + row + token - 1, mask=exists & (token > 0), other=0)
        changed = tl.where((number != before) & exists, token, 0)
        begins = tl.maximum(tl.associative_scan(changed, 0, _larger), begin)
        tl.store(starts + row + token, begins, mask=exists)
        begin = tl.max(begins, axis=0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@kernel
def plan_kernel(
    starts, long, short, count, cut, cuts, longest, length, bits, least, most, long_room,
    short_room, cut_room, run, step, first,
    ORDER: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, CAUSAL: tl.constexpr,
    OWN_KEYS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The items of one row of documents.

    In a tile of the row at most two tiles of long documents begin: one of the document that holds
    its first token, and the first one of that which holds its last token. What stands between these
    documents are short ones.
    """
    batch, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(length, OWN)
    starts += batch * length
    long += batch * long_room * 6
    short += batch * short_room * 4
    used, used_short, used_cuts, used_parts = 0, 0, 0, 0
    for chunk in range(0, 2 * tiles, LANES):
        slot = chunk + tl.arange(0, LANES)
        is_last = slot % 2 == 1
        low = tl.minimum(slot // 2 * OWN, length - 1)
        high = tl.minimum(low + OWN, length) - 1
        begin, other = tl.load(starts + low), tl.load(starts + high)
        is_two = begin != other
        first_begin, last_begin = begin, other
        first_end = _first_at_least(starts, begin + 1, length, bits)
        last_end = _first_at_least(starts, other + 1, length, bits)
        first_long, last_long = first_end - begin >= least, last_end - other >= least

        row = tl.where(is_last, 0, (low - begin + OWN - 1) // OWN)
        begin = tl.where(is_last, last_begin, first_begin)
        end = tl.where(is_last, last_end, first_end)
        reached = token_of(row * OWN, (0, run, step, first), ORDER) < end - begin
        exists = tl.where(is_last, last_long & is_two, first_long) & reached
        exists = exists & (begin + row * OWN <= high) & (slot < 2 * tiles)
        parts = exists.to(tl.int32)
        if cut is not None:
            visited = tl.load(longest + row, mask=exists, other=0)
            visited = tl.minimum(visited, tl.cdiv(end - begin, OTHER))
            parts = parts * tl.maximum(tl.cdiv(visited, most), 1)
        place = used + tl.cumsum(parts, axis=0) - parts
        part = tl.full((LANES,), -1, tl.int32)
        if cut is not None:
            is_cut = parts > 1
            pieces = tl.where(is_cut, parts, 0)
            part = tl.where(is_cut, used_parts + tl.cumsum(pieces, axis=0) - pieces, -1)
            number = used_cuts + tl.cumsum(is_cut.to(tl.int32), axis=0) - 1
            _store_numbers(
                cut + (batch * cut_room + number) * 5, is_cut, begin, end, row, part, parts
            )
            used_cuts += tl.sum(is_cut.to(tl.int32), axis=0)
            used_parts += tl.sum(pieces, axis=0)
        for n in range(0, tl.max(parts, axis=0)):
            at, mask = long + (place + n) * 6, n < parts
            own_part = tl.where(part < 0, -1, part + n)
            _store_numbers(at, mask, begin, end, row, own_part, parts * 0 + n)
            tl.store(at + 5, parts, mask=mask)
        used += tl.sum(parts, axis=0)

        own = tl.where(first_long, first_end, low)
        own_end = tl.where(last_long, last_begin, high + 1)
        base = tl.where(first_long, first_end, first_begin)
        stop = tl.where(last_long, last_begin, last_end)
        if CAUSAL and OWN_KEYS:
            base = own
        elif CAUSAL:
            stop = own_end
        exists = is_last & (slot < 2 * tiles) & (own < own_end)
        at = short + (used_short + tl.cumsum(exists.to(tl.int32), axis=0) - 1) * 4
        tl.store(at, own, mask=exists)
        tl.store(at + 1, own_end, mask=exists)
        tl.store(at + 2, base, mask=exists)
        tl.store(at + 3, stop, mask=exists)
        used_short += tl.sum(exists.to(tl.int32), axis=0)
    tl.store(count + batch, used_short)
    nothing = tl.full((LANES,), 0, tl.int32)
    for chunk in range(used, long_room, LANES):
        item = chunk + tl.arange(0, LANES)
        at, mask = long + item * 6, item < long_room
        _store_numbers(at, mask, nothing, nothing, nothing, nothing - 1, nothing)
        tl.store(at + 5, nothing + 1, mask=mask)
    if cut is not None:
        tl.store(cuts + batch, used_cuts)


@triton.jit
def _store_numbers(at, mask, a, b, c, d, e):
    """Store five neighbouring numbers of each item."""
    tl.store(at, a, mask=mask)
    tl.store(at + 1, b, mask=mask)
    tl.store(at + 2, c, mask=mask)
    tl.store(at + 3, d, mask=mask)
    tl.store(at + 4, e, mask=mask)


@triton.jit
def _first_at_least(numbers, value, length, bits):
    """The first of ``length`` ascending ``numbers`` that is at least ``value``: binary searches."""
    low, high = value.to(tl.int32) * 0, value.to(tl.int32) * 0 + length
    for _ in range(bits):
        middle = (low + high) // 2
        before = tl.load(numbers + middle, mask=middle < length, other=0) < value
        before = before & (low < high)
        high = tl.where(before, high, tl.minimum(middle, high))
        low = tl.where(before, middle + 1, low)
    return low
