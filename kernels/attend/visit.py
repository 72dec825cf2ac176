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


class Lists(NamedTuple):
    """Addresses of the work of all programs (``kernels.attend.work``), and of their heads."""

    items: Tensor  # with documents those of a plan (``kernels.attend.documents.Plan``)
    entries: Tensor
    head_of: Tensor | None  # None: all heads are launched
    offsets: Tensor | None = None  # of the rows among the entries, where documents have own tiles


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
              q_step, k_run, k_step, k_first, C: tl.constexpr):  # fmt: skip
    """What a program that owns a tile of queries does.

    Returns:
        Its queries, their limit and documents; the token from which the keys of its list count,
        their limit and order; the entries to visit, and the part that the result is. A limit of 0:
        there is nothing to do.
    """
    if C.BY_DOCUMENT:
        tokens, row, part, piece, pieces = document_item(lists.items, item, batch, work)
        first, q_end, base, k_end = tokens
        k_order = document_order((0, k_run, k_step, k_first), row)
        low, high = document_entries(
            lists, head, row, rows, k_end - base, piece, pieces, k_order, C.BLOCK_J, C.K_ORDER,
            C.PER_HEAD)  # fmt: skip
        i = first + tl.maximum(row, 0) * C.BLOCK_I + tl.arange(0, C.BLOCK_I)
        own = own_documents(documents, i, q_end)
        return i, q_end, own, base, k_end, k_order, low, high, part
    else:
        row, low, high, part = work_item(lists.items, item, head, work, C.PER_HEAD, C.CUT)
        residue = row // rows
        q_order, k_order = (residue, 1, q_step, 0), (residue, k_run, k_step, k_first)
        i = token_of(row % rows * C.BLOCK_I + tl.arange(0, C.BLOCK_I), q_order, C.Q_ORDER)
        own = own_documents(documents, i, num_queries)
        low, high = narrowed(
            lists.entries, low, high, documents, own, num_keys, k_order, C.BLOCK_J, C.K_ORDER
        )
        return i, num_queries, own, 0, num_keys, k_order, low, high, part


@triton.jit
def document_item(items, item, batch, work):
    """What a plan gives a program: its own tokens ``(first, limit)``, the range of the others, its
    row and part, and which part of how many (``kernels.attend.documents.Plan``).
    """
    at = items + (batch * work + item) * 8
    row, part = tl.load(at + 4), tl.load(at + 5)
    tokens = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    return tokens, row, part, tl.load(at + 6), tl.load(at + 7)


@triton.jit
def document_order(order, row):
    """The order of the tokens of a document: short ones, without a row, have that of the text."""
    residue, run, step, first = order
    dense = row < 0
    run, step = tl.where(dense, 1, run), tl.where(dense, 1, step)
    return residue, run, step, tl.where(dense, 0, first)


@triton.jit
def document_entries(lists, head, row, rows, tokens, piece, pieces, order, TILE: tl.constexpr,
                     ORDER: tl.constexpr, PER_HEAD: tl.constexpr):  # fmt: skip
    """The entries of one of ``pieces`` of a row, in a document of so many tokens."""
    offsets = lists.offsets + tl.maximum(row, 0)
    if PER_HEAD:
        offsets += head * (rows + 1)
    low = tl.where(row < 0, 0, tl.load(offsets))
    high = tl.where(row < 0, tl.cdiv(tokens, TILE), tl.load(offsets + 1))
    high = entries_before(lists.entries, low, high, tokens, order, TILE, ORDER)
    return low + (high - low) * piece // pieces, low + (high - low) * (piece + 1) // pieces


@triton.jit
def own_positions(position, batch, head, token, limit, own):
    """The positions of a program's own tokens: those given, or counted in their document."""
    if position is None:
        start, _, _ = own
        return token - start
    else:
        return load_positions(position, batch, head, token, limit)


@triton.jit
def load_positions(position, batch, head, token, limit):
    """Given positions of tokens."""
    first = position.ptr + batch * position.batch + head * position.head
    return tl.load(first + token * position.token, mask=token < limit, other=-1)


@triton.jit
def own_documents(documents, token, limit):
    """``(document, first, last)`` of a program's own tokens; zeros if there are no documents."""
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
def is_whole(tile, documents, own, token, limit, BY_DOCUMENT: tl.constexpr):
    """Whether all cells of a listed tile are visible, given its other tokens."""
    whole = tile & 1
    if documents is not None:
        if not BY_DOCUMENT:
            _, first, last = own
            whole = whole & (first == last)
            whole = whole & is_of_document(documents, token, limit, first)
    return whole


@triton.jit
def seen_cells(own_position, own_given, given, batch, head, numbers, documents, own, token, limit,
               RULE: tl.constexpr, OWN_KEYS: tl.constexpr):  # fmt: skip
    """The visible cells of a tile (own tokens, other tokens).

    Args:
        own_position: of the own tokens.
        own_given, given: positions of the own tokens and of the others that the caller gave, of
            which a negative one hides its token; None: they count in their document.
        own: what ``own_documents`` gives.
        token: the other tokens.
        OWN_KEYS: the own tokens are keys, and the others queries.
    """
    position = token
    if documents is not None:
        document = tl.load(documents + token, mask=token < limit, other=-2)
        position = token - document
    if given is not None:
        position = load_positions(given, batch, head, token, limit)
    # A rule may look a position up in a table.
    own_place = own_position if own_given is None else tl.maximum(own_position, 0)
    place = position if given is None else tl.maximum(position, 0)
    if OWN_KEYS:
        seen = is_visible(place[None, :], own_place[:, None], numbers, RULE)
    else:
        seen = is_visible(own_place[:, None], place[None, :], numbers, RULE)
    if own_given is not None:
        seen = seen & (own_position >= 0)[:, None]
    if given is not None:
        seen = seen & (position >= 0)[None, :]
    if documents is not None:
        own_document, _, _ = own
        seen = seen & (own_document[:, None] == document[None, :])
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
