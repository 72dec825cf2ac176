"""Rows that hold several documents: which tiles of which document each program takes.

A pattern counts positions from the start of each document. So a long document is cut into tiles
from its own start on, and visits what one tile list shows of a document as long as the row. Short
documents share the tiles of the row, and see all tiles of their documents, cell by cell. Which
documents there are, only the device knows: it plans, and the host gives it room.
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

ITEM = 8  # numbers of an item
CUT = 5  # numbers of a row that is cut
_LANES = 256


@dataclass(frozen=True, eq=False)
class Plan:
    """What programs do in each row of documents.

    Args:
        items: ``(B, programs, 8)`` int32: where the own tokens of an item begin, and the limit of
            them (0: nothing to do); where the tokens begin that its list counts from, and the limit
            of them; row of the list (-1: all tiles, dense); number of the part that the result is
            (-1: a whole row); which part of how many.
        cut: ``(B, cut rows, 5)`` int32: begin and limit of the own tokens, row, first part, parts.
        cuts: how many rows are cut, ``(B,)`` int32.
    """

    items: Tensor
    cut: Tensor | None
    cuts: Tensor | None


def first_tokens_of(documents: Tensor) -> Tensor:
    """`kernels.common.documents.first_tokens` in one launch."""
    B, L = documents.shape
    first = documents.new_empty((B, L), dtype=torch.int32)
    first_tokens_kernel[(B * triton.cdiv(L, _LANES),)](
        documents, first, L, L.bit_length(), LANES=_LANES
    )
    return first


def plan_of(
    setup: Setup, pass_: Pass, starts: Tensor | None, own_keys: bool = False
) -> Plan | None:  # fmt: skip
    """Plan one launch; None if documents have no tiles of their own.

    Args:
        starts: the first token of each token's document, ``(B, L)`` int32.
        own_keys: programs own tiles of keys, and visit queries.
    """
    if not pass_.by_document:
        return None
    work, C = setup.work, setup.constants
    B, L = starts.shape
    items = starts.new_empty((B, len(work), ITEM))
    cut = cuts = None
    if work.parts:
        cut, cuts = starts.new_empty((B, work.parts // 2, CUT)), starts.new_empty(B)
    own, other = (C.BLOCK_J, C.BLOCK_I) if own_keys else (C.BLOCK_I, C.BLOCK_J)
    order = pass_.k_order if own_keys else pass_.q_order
    plan_kernel[(B,)](
        starts, items, cut, cuts, work.longest, L, L.bit_length(), work.short, work.most, len(work),
        work.parts // 2, order.run, order.step, order.first,
        ORDER=C.K_ORDER if own_keys else C.Q_ORDER, OWN=own, OTHER=other,
        CAUSAL=pass_.pattern.is_causal, OWN_KEYS=own_keys, LANES=_LANES,
    )  # fmt: skip
    return Plan(items, cut, cuts)


@kernel
def first_tokens_kernel(documents, starts, length, bits, LANES: tl.constexpr):
    """Where the document of each token begins: a binary search for each."""
    chunks = tl.cdiv(length, LANES)
    base = (tl.program_id(0) // chunks).to(tl.int64) * length
    token = tl.program_id(0) % chunks * LANES + tl.arange(0, LANES)
    documents += base
    own = tl.load(documents + token, mask=token < length, other=0)
    begin = _first_at_least(documents, own, length, bits)
    tl.store(starts + base + token, begin, mask=token < length)


@kernel
def plan_kernel(
    starts, items, cut, cuts, longest, length, bits, short, most, work, room, run, step, first_cell,
    ORDER: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, CAUSAL: tl.constexpr,
    OWN_KEYS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The items of one row of documents.

    Every tile of the row may have three: the tile of a long document that begins in it, that of
    another which does, and the tokens of short documents that stand in it, side by side.
    """
    batch = tl.program_id(0).to(tl.int64)
    starts += batch * length
    items += batch * work * 8
    used, used_cuts, used_parts = 0, 0, 0
    for chunk in range(0, 3 * tl.cdiv(length, OWN), LANES):
        slot = chunk + tl.arange(0, LANES)
        low = slot // 3 * OWN
        exists = low < length
        low = tl.minimum(low, length - 1)
        high = tl.minimum(low + OWN, length) - 1
        a_begin, b_begin = tl.load(starts + low), tl.load(starts + high)
        a_end = _first_at_least(starts, a_begin + 1, length, bits)
        b_end = _first_at_least(starts, b_begin + 1, length, bits)
        a_long, b_long = a_end - a_begin >= short, b_end - b_begin >= short

        # A tile of the document of the first token, or the first tile of that of the last one.
        is_first, is_short = slot % 3 == 0, slot % 3 == 2
        row = tl.where(is_first, (low - a_begin + OWN - 1) // OWN, 0)
        begin, end = tl.where(is_first, a_begin, b_begin), tl.where(is_first, a_end, b_end)
        reached = token_of(row * OWN, (0, run, step, first_cell), ORDER) < end - begin
        is_long = tl.where(is_first, a_long, b_long & (a_begin != b_begin)) & reached
        is_long = is_long & (begin + row * OWN <= high) & (is_short == 0) & exists

        # The tokens of short documents between them.
        piece = tl.where(a_long, a_end, low)
        piece_end = tl.where(b_long, b_begin, high + 1)
        base, stop = tl.where(a_long, a_end, a_begin), tl.where(b_long, b_begin, b_end)
        if CAUSAL and OWN_KEYS:
            base = piece
        elif CAUSAL:
            stop = piece_end

        is_short = is_short & (piece < piece_end) & exists
        parts = (is_long | is_short).to(tl.int32)
        if cut is not None:
            count = tl.load(longest + row, mask=is_long, other=0)
            count = tl.minimum(count, tl.cdiv(end - begin, OTHER))
            parts = tl.where(is_long, tl.maximum(tl.cdiv(count, most), 1), parts)
        own = tl.where(is_long, begin, piece)
        own_end = tl.where(is_long, end, piece_end)
        base, stop = tl.where(is_long, begin, base), tl.where(is_long, end, stop)
        place = used + tl.cumsum(parts, axis=0) - parts
        part = tl.full((LANES,), -1, tl.int32)
        if cut is not None:
            is_cut = (parts > 1).to(tl.int32)
            cut_parts = parts * is_cut
            part = tl.where(is_cut > 0, used_parts + tl.cumsum(cut_parts, axis=0) - cut_parts, -1)
            at = cut + (batch * room + used_cuts + tl.cumsum(is_cut, axis=0) - is_cut) * 5
            tl.store(at, own, mask=is_cut > 0)
            tl.store(at + 1, own_end, mask=is_cut > 0)
            tl.store(at + 2, row, mask=is_cut > 0)
            tl.store(at + 3, part, mask=is_cut > 0)
            tl.store(at + 4, parts, mask=is_cut > 0)
            used_cuts += tl.sum(is_cut, axis=0)
            used_parts += tl.sum(cut_parts, axis=0)
        for n in range(0, tl.max(parts, axis=0)):
            at, mask = items + (place + n) * 8, n < parts
            tl.store(at, own, mask=mask)
            tl.store(at + 1, own_end, mask=mask)
            tl.store(at + 2, base, mask=mask)
            tl.store(at + 3, stop, mask=mask)
            tl.store(at + 4, tl.where(is_long, row, -1), mask=mask)
            tl.store(at + 5, tl.where(part < 0, -1, part + n), mask=mask)
            tl.store(at + 6, tl.full((LANES,), 0, tl.int32) + n, mask=mask)
            tl.store(at + 7, parts, mask=mask)
        used += tl.sum(parts, axis=0)
    for chunk in range(used, work, LANES):
        item = chunk + tl.arange(0, LANES)
        for n in range(8):  # of no tokens, and one part
            tl.store(items + item * 8 + n, tl.full((LANES,), n // 7, tl.int32), mask=item < work)
    if cut is not None:
        tl.store(cuts + batch, used_cuts)


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
