"""What the programs of all attention kernels share: which tiles they visit, which cells they see.

``C`` holds what a kernel is compiled for (``kernels.attend.setup.Constants``). A program owns a row
of tiles: its own tile, and the list of the others that it visits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.common.documents import (
    document_range,
    entries_before,
    entries_of_documents,
    is_of_document,
)
from kernels.common.loads import token_of
from kernels.patterns.rule_tree import is_visible

# Which tiles programs own (``kernels.attend.setup.Constants.TILES``):
ROW = tl.constexpr(0)  # those of the row
LONG = tl.constexpr(1)  # those of each long document, counted from its start
SHORT = tl.constexpr(2)  # those of the row, of which only tokens of short documents are taken


class Lists(NamedTuple):
    """Addresses of the work of all programs (``kernels.attend.work``), and of their heads."""

    items: Tensor  # with documents those of a plan (``kernels.attend.documents.Plan``)
    entries: Tensor
    head_of: Tensor | None  # None: all heads are launched
    # Where documents have tiles of their own:
    offsets: Tensor | None = None  # of the rows, among the entries
    room: int | None = None  # most items of a row of documents
    count: Tensor | None = None  # how many it has, of short ones


class Positions(NamedTuple):
    """Positions ``(B, H, tokens)`` at which the rule is evaluated, and their strides."""

    ptr: Tensor
    batch: int
    head: int
    token: int


@triton.jit
def head_and_batch(program, work, head_of, launch_heads):
    """Which work item, head and batch a program serves: items vary fastest, then heads."""
    batch_head = program // work
    head = batch_head % launch_heads
    if head_of is not None:
        head = tl.load(head_of + head)
    return program % work, head, (batch_head // launch_heads).to(tl.int64)


@triton.jit
def work_item(items, item, head, work, PER_HEAD: tl.constexpr, CUT: tl.constexpr):
    """``(row, low, high, part)``: a row of tiles, the entries to visit, and the result's part.

    The part is -1 for a whole row, at compile time if no row is cut.
    """
    if PER_HEAD:
        item += head * work
    items += 4 * item
    part = tl.load(items + 3) if CUT else -1
    return tl.load(items), tl.load(items + 1), tl.load(items + 2), part


@triton.jit
def query_row(lists, item, head, batch, work, rows, documents, num_queries, num_keys,
              q_step, q_first, k_run, k_step, k_first, C: tl.constexpr):  # fmt: skip
    """What a program that owns a tile of queries does.

    Returns:
        Its queries, their places in the document or row, their limit and documents; the token
        from which the keys of its list count, their limit and order; the entries to visit, and the
        part that the result is.
    """
    if C.TILES == ROW:
        row, low, high, part = work_item(lists.items, item, head, work, C.PER_HEAD, C.CUT)
        residue = row // rows
        q_order, k_order = (residue, 1, q_step, q_first), (residue, k_run, k_step, k_first)
        i = token_of(row % rows * C.BLOCK_I + tl.arange(0, C.BLOCK_I), q_order, C.Q_ORDER)
        own = own_documents(documents, i, num_queries)
        low, high = narrowed(
            lists.entries, low, high, documents, own, num_keys, k_order, C.BLOCK_J, C.K_ORDER
        )
        return i, i, num_queries, own, 0, num_keys, k_order, low, high, part
    else:
        k_order = 0, k_run, k_step, k_first
        first, q_end, base, k_end, row, part, piece, pieces = document_item(
            lists, item, batch, C.TILES
        )
        place = row * C.BLOCK_I + tl.arange(0, C.BLOCK_I)
        i = first + place
        low, high = document_entries(
            lists, head, row, rows, k_end - base, piece, pieces, k_order, C.BLOCK_J, C.K_ORDER,
            C.PER_HEAD, C.TILES)  # fmt: skip
        own = starts_of(documents, i, q_end, C.TILES)
        return i, place, q_end, own, base, k_end, k_order, low, high, part


@triton.jit
def document_item(lists, item, batch, TILES: tl.constexpr):
    """What a plan gives a program (``kernels.attend.documents.Plan``).

    Returns:
        Where its own tokens begin, and their limit; the same of the others; its row, the part that
        the result is, and which piece of how many of the row's list it visits.
    """
    if TILES == LONG:
        at = lists.items + (batch * lists.room + item) * 6
        begin, end = tl.load(at), tl.load(at + 1)
        row, part = tl.load(at + 2), tl.load(at + 3)
        return begin, end, begin, end, row, part, tl.load(at + 4), tl.load(at + 5)
    else:
        at = lists.items + (batch * lists.room + item) * 4
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), 0, -1, 0, 1


@triton.jit
def document_entries(lists, head, row, rows, tokens, piece, pieces, order, TILE: tl.constexpr,
                     ORDER: tl.constexpr, PER_HEAD: tl.constexpr,
                     TILES: tl.constexpr):  # fmt: skip
    """The entries of one of ``pieces`` of a row, where the others are so many tokens."""
    if TILES == SHORT:
        return 0, tl.cdiv(tokens, TILE)
    else:
        offsets = lists.offsets + row
        if PER_HEAD:
            offsets += head * (rows + 1)
        low = tl.load(offsets)
        high = entries_before(lists.entries, low, tl.load(offsets + 1), tokens, order, TILE, ORDER)
        return low + (high - low) * piece // pieces, low + (high - low) * (piece + 1) // pieces


@triton.jit
def starts_of(documents, token, limit, TILES: tl.constexpr):
    """Where the documents of tokens begin, unless a program's tokens are all of a long one."""
    if documents is None or TILES == LONG:
        return 0
    else:
        return tl.load(documents + token, mask=token < limit, other=-1)


@triton.jit
def own_positions(position, batch, head, token, place, limit, own, TILES: tl.constexpr):
    """The positions of a program's own tokens: those given, or counted in their document."""
    if position is not None:
        return load_positions(position, batch, head, token, limit)
    elif TILES == SHORT:
        return token - own
    else:
        return place


@triton.jit
def load_positions(position, batch, head, token, limit):
    """Given positions of tokens."""
    first = position.ptr + batch * position.batch + head * position.head
    return tl.load(first + token * position.token, mask=token < limit, other=-1)


@triton.jit
def own_documents(documents, token, limit):
    """``(document, first, last)`` of a program's own tokens, where tiles are those of the row.

    Zeros if there are no documents.
    """
    if documents is None:
        return 0, 0, 0
    else:
        return document_range(documents, token, limit)


@triton.jit
def narrowed(entries, low, high, documents, own, limit, order, TILE: tl.constexpr,
             ORDER: tl.constexpr):  # fmt: skip
    """A row of entries without the tiles that hold none of a program's own documents."""
    if documents is None:
        return low, high
    else:
        _, first, last = own
        return entries_of_documents(
            entries, low, high, documents, first, last, limit, order, TILE, ORDER
        )


@triton.jit
def is_whole(tile, documents, own, token, limit, TILES: tl.constexpr):
    """Whether all cells of a listed tile are visible, given its other tokens."""
    whole = tile & 1
    if documents is not None:
        if TILES == ROW:
            _, first, last = own
            whole = whole & (first == last)
            whole = whole & is_of_document(documents, token, limit, first)
    return whole


@triton.jit
def seen_cells(own_position, own_given, given, batch, head, numbers, documents, own, starts, token,
               place, limit, RULE: tl.constexpr, OWN_KEYS: tl.constexpr,
               TILES: tl.constexpr):  # fmt: skip
    """The visible cells of a tile (own tokens, other tokens).

    Args:
        own_position: of the own tokens.
        own_given, given: positions of the own tokens and of the others that the caller gave, of
            which a negative one hides its token; None: they count in their document.
        own: documents of the own tokens: what ``own_documents`` or ``starts_of`` gives.
        starts: where the documents of the others begin, from ``starts_of``.
        token, place: the other tokens, and their places in the long document or row.
        OWN_KEYS: the own tokens are keys, and the others queries.
    """
    position = token - starts if TILES == SHORT else place
    if given is not None:
        position = load_positions(given, batch, head, token, limit)
    # A rule may look a position up in a table.
    own_known = own_position if own_given is None else tl.maximum(own_position, 0)
    known = position if given is None else tl.maximum(position, 0)
    if OWN_KEYS:
        seen = is_visible(known[None, :], own_known[:, None], numbers, RULE)
    else:
        seen = is_visible(own_known[:, None], known[None, :], numbers, RULE)
    if own_given is not None:
        seen = seen & (own_position >= 0)[:, None]
    if given is not None:
        seen = seen & (position >= 0)[None, :]
    if documents is not None:
        if TILES == ROW:
            own_document, _, _ = own
            seen = seen & (own_document[:, None] == starts[None, :])
        elif TILES == SHORT:
            seen = seen & (own[:, None] == starts[None, :])
    return seen


@triton.jit
def part_number(part, work, parts):
    """The number of a part over all batches and heads."""
    return (tl.program_id(0) // work).to(tl.int64) * parts + part


@triton.jit
def store_part(part_ptr, part, x, d, BLOCK: tl.constexpr, D: tl.constexpr):
    """Write the result ``x (BLOCK, D)`` of a part of a row."""
    rows = part_ptr + part * BLOCK * D + tl.arange(0, BLOCK)[:, None] * D
    tl.store(rows + d[None, :], x, mask=d[None, :] < D)
