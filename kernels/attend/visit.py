"""What the programs of all attention kernels share: which tiles they visit, which cells they see.

``C`` holds what a kernel is compiled for (``kernels.attend.setup.Constants``). A program owns a row
of tiles: its own tile, and the list of the others that it visits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.common.documents import document_range, entries_of_documents, is_of_document
from kernels.patterns.rule_tree import is_visible


class Lists(NamedTuple):
    """Addresses of the work of all programs (``kernels.attend.work.Work``), and of their heads."""

    items: Tensor
    entries: Tensor
    head_of: Tensor | None  # None: all heads are launched


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
def positions_of(position, batch, head, token, limit):
    """The positions at which the rule is evaluated: those given, or the token numbers."""
    if position is None:
        return token
    else:
        first = position.ptr + batch * position.batch + head * position.head
        return tl.load(first + token * position.token, mask=token < limit, other=0)


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
def is_whole(tile, documents, own, token, limit):
    """Whether all cells of a listed tile are visible, given its other tokens."""
    whole = tile & 1
    if documents is not None:
        _, first, last = own
        whole = whole & (first == last)
        whole = whole & is_of_document(documents, token, limit, first)
    return whole


@triton.jit
def seen_cells(own_position, position, numbers, documents, own, token, limit, RULE: tl.constexpr,
               OWN_KEYS: tl.constexpr):  # fmt: skip
    """The visible cells of a tile (own tokens, other tokens).

    Args:
        own_position, position: of the own tokens and of the others, which are ``token``.
        own: what ``own_documents`` gives.
        OWN_KEYS: the own tokens are keys, and the others queries.
    """
    if OWN_KEYS:
        seen = is_visible(position[None, :], own_position[:, None], numbers, RULE)
    else:
        seen = is_visible(own_position[:, None], position[None, :], numbers, RULE)
    if documents is not None:
        own_document, _, _ = own
        document = tl.load(documents + token, mask=token < limit, other=-2)
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
