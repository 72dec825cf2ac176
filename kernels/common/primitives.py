"""What every attention kernel shares: loads of tiles, positions of tokens, visibility, softmax.

Names inside kernels: ``q, k, v, out`` are tiles in registers, ``*_ptr`` addresses in memory; ``i``
indexes query tokens and ``j`` key tokens. Token and batch numbers become 64-bit before they meet a
stride: a tensor of more than 2**31 elements must not wrap around.
"""

import inspect

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# How storage slots of a pass map to tokens of the sequence (kernels.patterns.order.Order):
PLAIN = tl.constexpr(0)  # slot n is token n
CLASSES = tl.constexpr(1)  # group g holds tokens g, g + step, g + 2 step ...
GATHERED = tl.constexpr(2)  # runs of `run` tokens, one every `step` tokens, from `first` on


# Integers whose value must not decide what is compiled: a new length or pattern compiles nothing.
# (Strides stay: that a row is contiguous and aligned makes its loads wide.)
_COUNTS = [
    "group_size", "table_stride", "heads", "launch_heads", "work", "slots", "rows", "queries",
    "keys", "q_step", "k_run", "k_step", "k_first", "tokens", "length", "run", "step", "first",
]  # fmt: skip


def kernel(function):
    """``triton.jit`` for a kernel that is launched, compiled once for all of its counts."""
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in _COUNTS if name in names])


@triton.jit
def token_of(slot, group, run, step, first, ORDER: tl.constexpr):
    """The token that stands in a storage slot."""
    if ORDER == CLASSES:
        return slot * step + group
    if ORDER == GATHERED:
        return slot // run * step + first + slot % run
    return slot


@triton.jit
def load_rows(ptr, token, limit, token_stride, d, d_stride, D: tl.constexpr):
    """Rows ``token`` of a ``(tokens, D)`` matrix, 0 beyond ``limit`` and beyond ``D``."""
    address = ptr + token[:, None].to(tl.int64) * token_stride + d[None, :] * d_stride
    return tl.load(address, mask=(token[:, None] < limit) & (d[None, :] < D), other=0.0)


@triton.jit
def store_rows(ptr, x, token, limit, token_stride, d, D: tl.constexpr):
    """Write rows ``token`` of a ``(tokens, D)`` matrix whose columns are contiguous."""
    address = ptr + token[:, None].to(tl.int64) * token_stride + d[None, :]
    mask = (token[:, None] < limit) & (d[None, :] < D)
    tl.store(address, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(source, base, batch, head, slot, group, run, first, token, limit, token_stride, d,
              d_stride, D: tl.constexpr, TMA: tl.constexpr, ORDER: tl.constexpr):  # fmt: skip
    """A tile of rows, from slot ``slot`` of a group on.

    By Hopper's copy engine (TMA) from a descriptor of ``(B, H, tokens, D)``, or of ``(B, H, blocks,
    tokens of a block, D)`` for an order of its own; or through pointers, row by row.
    """
    rows: tl.constexpr = token.shape[0]
    if TMA:
        if ORDER == CLASSES:
            x = source.load([batch, head, slot, group, 0])
        elif ORDER == GATHERED:
            x = source.load([batch, head, slot // run, first, 0])
        else:
            x = source.load([batch, head, slot, 0])
        return x.reshape(rows, d.shape[0])
    return load_rows(source + base, token, limit, token_stride, d, d_stride, D)


@triton.jit
def softmax_step(score, row_max, row_sum, scale):
    """One step of the online softmax in base 2, over raw scores (M, N).

    Returns the weights, the factor that older sums shrink by, and the new maximum and sum.
    """
    new_max = tl.maximum(row_max, tl.max(score, axis=1))
    safe = tl.where(new_max == float("-inf"), 0.0, new_max) * scale  # no visible key so far
    weight = tl.exp2(score * scale - safe[:, None])
    shrink = tl.exp2(row_max * scale - safe)
    return weight, shrink, new_max, row_sum * shrink + tl.sum(weight, axis=1)


@triton.jit
def positions_of(position, stride, batch, head, token, limit):
    """The positions at which the rule is evaluated: those given, or the token numbers."""
    if position is None:
        return token
    address = position + batch * stride[0] + head * stride[1] + token * stride[2]
    return tl.load(address, mask=token < limit, other=0)


@triton.jit
def head_and_batch(program, work, head_of, launch_heads):
    """Which work item, head and batch a program serves: items vary fastest, then heads."""
    batch_head = program // work
    head = batch_head % launch_heads
    if head_of is not None:
        head = tl.load(head_of + head)
    return program % work, head, (batch_head // launch_heads).to(tl.int64)


@triton.jit
def work_item(items, item, head, work, PER_HEAD: tl.constexpr):
    """``(row, low, high, slot)``: a row of tiles, and the entries of the list to visit."""
    if PER_HEAD:
        item += head * work
    items += 4 * item
    return tl.load(items), tl.load(items + 1), tl.load(items + 2), tl.load(items + 3)


@triton.jit
def document_range(documents, token, limit):
    """Documents of a tile's tokens (-1 beyond the limit), and the first and last of them."""
    document = tl.load(documents + token, mask=token < limit, other=-1)
    return document, tl.load(documents + tl.minimum(tl.min(token), limit - 1)), tl.max(document)


@triton.jit
def is_of_document(documents, token, limit, document):
    """Whether all tokens of a tile are of one document, given that documents do not decrease."""
    first, last = tl.minimum(tl.min(token), limit - 1), tl.minimum(tl.max(token), limit - 1)
    return (tl.load(documents + first) == document) & (tl.load(documents + last) == document)


@triton.jit
def entries_of_documents(
    entries, low, high, documents, first_document, last_document, limit, TILE: tl.constexpr,
    group, run, step, first, ORDER: tl.constexpr,
):  # fmt: skip
    """Narrow a row of the list to the tiles that hold any token of a range of documents."""
    low = _search(entries, low, high, documents, first_document, limit, TILE, False,
                  group, run, step, first, ORDER)  # fmt: skip
    high = _search(entries, low, high, documents, last_document, limit, TILE, True,
                   group, run, step, first, ORDER)  # fmt: skip
    return low, high


@triton.jit
def _search(entries, low, high, documents, document, limit, TILE: tl.constexpr, PAST: tl.constexpr,
            group, run, step, first, ORDER: tl.constexpr):  # fmt: skip
    """The first entry whose tile reaches ``document`` (lies past it if PAST): a binary search,

    since tiles ascend in a row and documents do not decrease.
    """
    while low < high:
        middle = (low + high) // 2
        slot = (tl.load(entries + middle) >> 1) * TILE
        edge = slot if PAST else slot + TILE - 1
        token = tl.minimum(token_of(edge, group, run, step, first, ORDER), limit - 1)
        found = tl.load(documents + token)
        before = (found <= document) if PAST else (found < document)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low
