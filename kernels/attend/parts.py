"""Long rows of tiles are cut into parts; these kernels merge or add up the results of the parts.

Few programs run here, and each must keep many loads in flight: PARTS are read at a time.
"""

import triton
import triton.language as tl

from kernels.attend.backward import add_rows
from kernels.attend.forward import write_output
from kernels.attend.visit import head_and_batch, part_number
from kernels.common.jit import kernel
from kernels.common.loads import token_of
from kernels.common.softmax import LOG2_E


@kernel
def merge_parts_kernel(
    out, lse_ptr, previous, part_ptr, part_lse_ptr, cut, cuts, head_of,
    heads, launch_heads, work, parts, room, rows, tokens, run, step, first,
    ORDER: tl.constexpr, BLOCK: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the outputs of the parts, for ROWS queries of each row that was cut."""
    item, head, batch, r = _own_rows(head_of, launch_heads, work, BLOCK, ROWS)
    row_base = (batch * heads + head) * tokens
    order = run, step, first
    if cuts is None:
        i, limit, part, count = _cut_row(
            cut + 3 * item, r, work, parts, rows, tokens, order, ORDER, BLOCK, ROWS
        )
        _merge_row(
            out, lse_ptr + row_base, previous, part_ptr, part_lse_ptr, part, count, r, batch, head,
            i, limit, BLOCK, DV, BLOCK_DV, ROWS, PARTS)  # fmt: skip
    else:
        for n in range(item, tl.load(cuts + batch), work):
            i, limit, part, count = _document_row(
                cut + (batch * room + n) * 5, r, work, parts, order, ORDER, BLOCK, ROWS
            )
            _merge_row(
                out, lse_ptr + row_base, previous, part_ptr, part_lse_ptr, part, count, r, batch,
                head, i, limit, BLOCK, DV, BLOCK_DV, ROWS, PARTS)  # fmt: skip


@triton.jit
def _merge_row(
    out, lse_ptr, previous, part_ptr, part_lse_ptr, part, count, r, batch, head, i, limit,
    BLOCK: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    dv = tl.arange(0, BLOCK_DV)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    merged = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for n in range(0, count, PARTS):
        line, exists = _lines(part, n, count, r, BLOCK, PARTS)
        lse = tl.load(part_lse_ptr + line, mask=exists, other=float("-inf")) * LOG2_E
        value = _load_lines(part_ptr, line, exists, dv, DV)
        new = tl.maximum(largest, tl.max(lse, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight, shrink = tl.exp2(lse - safe[None, :]), tl.exp2(largest - safe)
        total = total * shrink + tl.sum(weight, axis=0)
        merged = merged * shrink[:, None] + tl.sum(value * weight[:, :, None], axis=0)
        largest = new
    seen_any = total > 0
    total = tl.where(seen_any, total, 1.0)
    merged = merged / total[:, None]
    lse = tl.where(seen_any, (largest + tl.log2(total)) / LOG2_E, float("-inf"))
    write_output(out, lse_ptr, previous, merged, lse, batch, head, i, limit, dv, DV)


@kernel
def sum_parts_kernel(
    dx, previous, part_ptr, cut, cuts, head_of,
    launch_heads, work, parts, room, rows, tokens, run, step, first,
    ORDER: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of the parts in one order, for ROWS tokens of each row that was cut."""
    item, head, batch, r = _own_rows(head_of, launch_heads, work, BLOCK, ROWS)
    order = run, step, first
    if cuts is None:
        token, limit, part, count = _cut_row(
            cut + 3 * item, r, work, parts, rows, tokens, order, ORDER, BLOCK, ROWS
        )
        _sum_row(
            dx, previous, part_ptr, part, count, r, batch, head, token, limit, BLOCK, D, BLOCK_D,
            ROWS, PARTS)  # fmt: skip
    else:
        for n in range(item, tl.load(cuts + batch), work):
            token, limit, part, count = _document_row(
                cut + (batch * room + n) * 5, r, work, parts, order, ORDER, BLOCK, ROWS
            )
            _sum_row(
                dx, previous, part_ptr, part, count, r, batch, head, token, limit, BLOCK, D,
                BLOCK_D, ROWS, PARTS)  # fmt: skip


@triton.jit
def _sum_row(dx, previous, part_ptr, part, count, r, batch, head, token, limit,
             BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
             PARTS: tl.constexpr):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for n in range(0, count, PARTS):
        line, exists = _lines(part, n, count, r, BLOCK, PARTS)
        total += tl.sum(_load_lines(part_ptr, line, exists, d, D), axis=0)
    add_rows(dx, previous, total, batch, head, token, limit, d, D)


@triton.jit
def _own_rows(head_of, launch_heads, work, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Which cut row, head and batch a program serves, and which ROWS rows of its tile."""
    chunks: tl.constexpr = BLOCK // ROWS
    item, head, batch = head_and_batch(tl.program_id(0), work * chunks, head_of, launch_heads)
    return item // chunks, head, batch, item % chunks * ROWS + tl.arange(0, ROWS)


@triton.jit
def _cut_row(cut, r, work, parts, rows, tokens, order, ORDER: tl.constexpr, BLOCK: tl.constexpr,
             ROWS: tl.constexpr):  # fmt: skip
    """Tokens of a tile's rows ``r`` and the limit of these, first part, and number of parts.

    ``cut`` points to ``(row, first part, parts)``; where it is filled up there are no parts, and
    the limit of 0 lets nothing be written.
    """
    row, part, count = tl.load(cut), tl.load(cut + 1), tl.load(cut + 2)
    run, step, first = order
    token = token_of(row % rows * BLOCK + r, (row // rows, run, step, first), ORDER)
    limit = tl.where(count > 0, tokens, 0)
    return token, limit, part_number(part, work * (BLOCK // ROWS), parts), count


@triton.jit
def _document_row(cut, r, work, parts, order, ORDER: tl.constexpr, BLOCK: tl.constexpr,
                  ROWS: tl.constexpr):  # fmt: skip
    """The same of a row of a document: ``(first token, limit, row, first part, parts)``."""
    begin, limit, row = tl.load(cut), tl.load(cut + 1), tl.load(cut + 2)
    run, step, first = order
    token = begin + token_of(row * BLOCK + r, (0, run, step, first), ORDER)
    part = part_number(tl.load(cut + 3), work * (BLOCK // ROWS), parts)
    return token, limit, part, tl.load(cut + 4)


@triton.jit
def _lines(part, n, count, r, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Rows of the parts from the ``n``-th on, ``(PARTS, ROWS)``, and which of them exist."""
    own = n + tl.arange(0, PARTS)
    line = (part + own)[:, None] * BLOCK + r[None, :]
    return line, (own < count)[:, None] & (line >= 0)


@triton.jit
def _load_lines(part_ptr, line, exists, d, D: tl.constexpr):
    """``(PARTS, ROWS, D)``, 0 where there is no such part."""
    address = part_ptr + line[:, :, None] * D + d[None, None, :]
    mask = exists[:, :, None] & (d < D)[None, None, :]
    return tl.load(address, mask=mask, other=0.0)
