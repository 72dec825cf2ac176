"""Forward pass in Triton: a program per (batch, head, tile of queries) visits its tiles of keys."""

import triton
import triton.language as tl

from kernels.common.primitives import (
    LOG2_E,
    document_range,
    entries_of_documents,
    head_and_batch,
    is_of_document,
    kernel,
    load_rows,
    load_tile,
    positions_of,
    softmax_step,
    store_rows,
    token_of,
    work_item,
)
from kernels.patterns.rule import is_visible, read_numbers


@kernel
def forward_kernel(
    q_ptr, k, v, out_ptr, lse_ptr, prior_ptr, part_ptr, part_lse_ptr,
    q_stride, k_stride, v_stride, out_stride,
    group_size, items, entries, table, head_of, documents, q_position, k_position,
    q_position_stride, k_position_stride, table_stride,
    scale, heads, launch_heads, work, slots, rows, queries, keys,
    q_step, k_run, k_step, k_first,
    RULE: tl.constexpr, PER_HEAD: tl.constexpr,
    K_ORDER: tl.constexpr, Q_ORDER: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TMA: tl.constexpr, CUT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of a tile of queries, or of a piece of its row: long rows are cut.

    A whole row (slot < 0) is written to ``out`` and ``lse``, merged with the pass before it if
    there was one (its output in ``prior``, its lse in ``lse``); a piece goes to its slot of
    ``part``.
    """
    item, head, batch = head_and_batch(tl.program_id(0), work, head_of, launch_heads)
    row, low, high, slot = work_item(items, item, head, work, PER_HEAD)
    numbers = read_numbers(table + head * table_stride, RULE)
    kv_head = head // group_size

    group = row // rows
    i = token_of(row % rows * BLOCK_I + tl.arange(0, BLOCK_I), group, 1, q_step, 0, Q_ORDER)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_ptr += batch * q_stride[0] + head.to(tl.int64) * q_stride[1]
    q = load_rows(q_ptr, i, queries, q_stride[2], d, q_stride[3], D)
    k_base = batch * k_stride[0] + kv_head.to(tl.int64) * k_stride[1]
    v_base = batch * v_stride[0] + kv_head.to(tl.int64) * v_stride[1]
    i_position = positions_of(q_position, q_position_stride, batch, head, i, queries)
    if documents is not None:
        documents += batch * queries
        i_document, first_document, last_document = document_range(documents, i, queries)
        low, high = entries_of_documents(
            entries, low, high, documents, first_document, last_document, keys, BLOCK_J,
            group, k_run, k_step, k_first, K_ORDER)  # fmt: skip

    row_max = tl.full((BLOCK_I,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_I,), tl.float32)
    acc = tl.zeros((BLOCK_I, BLOCK_DV), tl.float32)
    upcoming = tl.load(entries + low)
    for entry in tl.range(low, high, num_stages=STAGES):
        tile, upcoming = upcoming, tl.load(entries + entry + 1)
        j_slot = (tile >> 1) * BLOCK_J
        j = token_of(j_slot + tl.arange(0, BLOCK_J), group, k_run, k_step, k_first, K_ORDER)
        k_tile = load_tile(
            k, k_base, batch.to(tl.int32), kv_head, j_slot, group, k_run, k_first, j, keys,
            k_stride[2], d, k_stride[3], D, TMA, K_ORDER)  # fmt: skip
        score = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        last = token_of(j_slot + BLOCK_J - 1, group, k_run, k_step, k_first, K_ORDER)
        whole = (tile & 1) & (last < keys)
        if documents is not None:
            whole = whole & (first_document == last_document)
            whole = whole & is_of_document(documents, j, keys, first_document)
        if whole == 0:
            j_position = positions_of(k_position, k_position_stride, batch, kv_head, j, keys)
            seen = is_visible(i_position[:, None], j_position[None, :], numbers, RULE)
            seen = seen & (j < keys)[None, :]
            if documents is not None:
                j_document = tl.load(documents + j, mask=j < keys, other=-2)
                seen = seen & (i_document[:, None] == j_document[None, :])
            score = tl.where(seen, score, float("-inf"))
        weight, shrink, row_max, row_sum = softmax_step(
            score, row_max, row_sum, scale * LOG2_E)  # fmt: skip
        v_tile = load_tile(
            v, v_base, batch.to(tl.int32), kv_head, j_slot, group, k_run, k_first, j, keys,
            v_stride[2], dv, v_stride[3], DV, TMA, K_ORDER)  # fmt: skip
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * shrink[:, None],
                     input_precision=PRECISION)  # fmt: skip

    seen_any = row_sum > 0
    row_sum = tl.where(seen_any, row_sum, 1.0)
    out = acc / row_sum[:, None]
    lse = tl.where(seen_any, row_max * scale + tl.log2(row_sum) / LOG2_E, float("-inf"))
    if CUT:
        if slot >= 0:
            r = tl.arange(0, BLOCK_I)
            part = (tl.program_id(0) // work).to(tl.int64) * slots + slot
            store_rows(part_ptr + part * BLOCK_I * DV, out, r, BLOCK_I, DV, dv, DV)
            tl.store(part_lse_ptr + part * BLOCK_I + r, lse)
        else:
            _write(out_ptr, lse_ptr, prior_ptr, out, lse, batch, head, heads, i, queries, dv,
                   out_stride, DV)  # fmt: skip
    else:
        _write(out_ptr, lse_ptr, prior_ptr, out, lse, batch, head, heads, i, queries, dv,
               out_stride, DV)  # fmt: skip


@triton.jit
def _write(out_ptr, lse_ptr, prior_ptr, out, lse, batch, head, heads, i, queries, dv,
           out_stride, DV: tl.constexpr):  # fmt: skip
    """Store rows of the output, merged with the pass before if there was one."""
    base = batch * out_stride[0] + head.to(tl.int64) * out_stride[1]
    lse_ptr += (batch * heads + head) * queries
    if prior_ptr is not None:
        before = load_rows(prior_ptr + base, i, queries, out_stride[2], dv, 1, DV)
        before_lse = tl.load(lse_ptr + i, mask=i < queries, other=float("-inf"))
        out, lse = merge_pair(before, before_lse, out, lse)
    store_rows(out_ptr + base, out, i, queries, out_stride[2], dv, DV)
    tl.store(lse_ptr + i, lse, mask=i < queries)


@triton.jit
def merge_pair(out1, lse1, out2, lse2):
    """Attention over the union of two disjoint sets of keys: (M, Dv) and (M,) each."""
    larger = tl.maximum(lse1, lse2)
    safe = tl.where(larger == float("-inf"), 0.0, larger)
    weight1, weight2 = tl.exp2((lse1 - safe) * LOG2_E), tl.exp2((lse2 - safe) * LOG2_E)
    total = weight1 + weight2
    share = 1.0 / tl.where(total > 0, total, 1.0)
    out = out1 * (weight1 * share)[:, None] + out2 * (weight2 * share)[:, None]
    return out, tl.where(total > 0, safe + tl.log2(total) / LOG2_E, float("-inf"))


@kernel
def merge_pieces_kernel(
    out_ptr, lse_ptr, prior_ptr, part_ptr, part_lse_ptr, out_stride,
    pieces_of, head_of, heads, launch_heads, work, slots, rows, queries, q_step,
    Q_ORDER: tl.constexpr, BLOCK_I: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of ROWS queries of a row that was cut.

    ``pieces_of`` holds ``(row, first slot, pieces)``. PIECES are read at a time: few programs run
    here, and each must keep many loads in flight.
    """
    chunks: tl.constexpr = BLOCK_I // ROWS
    item, head, batch = head_and_batch(tl.program_id(0), work * chunks, head_of, launch_heads)
    row = tl.load(pieces_of + 3 * (item // chunks))
    slot = tl.load(pieces_of + 3 * (item // chunks) + 1)
    pieces = tl.load(pieces_of + 3 * (item // chunks) + 2)
    r, dv = item % chunks * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
    i = token_of(row % rows * BLOCK_I + r, row // rows, 1, q_step, 0, Q_ORDER)
    slot += (tl.program_id(0) // (work * chunks)).to(tl.int64) * slots

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for first in range(0, pieces, PIECES):
        n = first + tl.arange(0, PIECES)
        line = (slot + n)[:, None] * BLOCK_I + r[None, :]
        exists = (n < pieces)[:, None] & (line >= 0)
        lse = tl.load(part_lse_ptr + line, mask=exists, other=float("-inf")) * LOG2_E
        address = part_ptr + line[:, :, None] * DV + dv[None, None, :]
        part = tl.load(address, mask=exists[:, :, None] & (dv < DV)[None, None, :], other=0.0)
        new = tl.maximum(largest, tl.max(lse, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight, shrink = tl.exp2(lse - safe[None, :]), tl.exp2(largest - safe)
        total = total * shrink + tl.sum(weight, axis=0)
        out = out * shrink[:, None] + tl.sum(part * weight[:, :, None], axis=0)
        largest = new
    seen_any = total > 0
    total = tl.where(seen_any, total, 1.0)
    out = out / total[:, None]
    lse = tl.where(seen_any, (largest + tl.log2(total)) / LOG2_E, float("-inf"))
    _write(out_ptr, lse_ptr, prior_ptr, out, lse, batch, head, heads, i, queries, dv,
           out_stride, DV)  # fmt: skip
