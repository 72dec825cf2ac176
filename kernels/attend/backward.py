"""Backward pass in Triton: dQ over the tile list, then dK and dV over its inverse; no atomics.

With ``P = exp(S - lse)`` of the *whole* attention, every pass of a pattern adds its own tiles:
``dS = P (dP - shift)``, ``shift = sum(dout * out) - dlse`` (FlashAttention-2, Dao 2023,
arXiv:2307.08691, with the gradient through lse added).
"""

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
    store_rows,
    token_of,
    work_item,
)
from kernels.patterns.rule import is_visible, read_numbers


@kernel
def query_kernel(
    q_ptr, k, v, out_ptr, dout_ptr, lse_ptr, dlse_ptr, shift_ptr, lse2_ptr, dq_ptr, prior_ptr,
    part_ptr,
    q_stride, k_stride, v_stride, out_stride, dout_stride, dq_stride,
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
    """Gradient of a tile of queries. The first pass of a chain also stores ``shift`` and ``lse2``,

    the lse in base 2, infinite for queries that see nothing: exp2(score - lse2) is then 0.
    """
    item, head, batch = head_and_batch(tl.program_id(0), work, head_of, launch_heads)
    row, low, high, slot = work_item(items, item, head, work, PER_HEAD)
    numbers = read_numbers(table + head * table_stride, RULE)
    kv_head = head // group_size

    group = row // rows
    i = token_of(row % rows * BLOCK_I + tl.arange(0, BLOCK_I), group, 1, q_step, 0, Q_ORDER)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_ptr += batch * q_stride[0] + head.to(tl.int64) * q_stride[1]
    dout_ptr += batch * dout_stride[0] + head.to(tl.int64) * dout_stride[1]
    q = load_rows(q_ptr, i, queries, q_stride[2], d, q_stride[3], D)
    dout = load_rows(dout_ptr, i, queries, dout_stride[2], dv, dout_stride[3], DV)
    row_base = (batch * heads + head) * queries
    if prior_ptr is not None:
        shift = tl.load(shift_ptr + row_base + i, mask=i < queries, other=0.0)
        lse = tl.load(lse2_ptr + row_base + i, mask=i < queries, other=float("inf"))
    else:
        lse = tl.load(lse_ptr + row_base + i, mask=i < queries, other=float("-inf"))
        blind = lse == float("-inf")
        lse = tl.where(blind, float("inf"), lse * LOG2_E)
        out_ptr += batch * out_stride[0] + head.to(tl.int64) * out_stride[1]
        out = load_rows(out_ptr, i, queries, out_stride[2], dv, out_stride[3], DV)
        shift = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
        if dlse_ptr is not None:
            shift -= tl.load(dlse_ptr + row_base + i, mask=i < queries, other=0.0)
        shift = tl.where(blind, 0.0, shift)
        tl.store(shift_ptr + row_base + i, shift, mask=i < queries)
        tl.store(lse2_ptr + row_base + i, lse, mask=i < queries)
    dout = dout.to(q.dtype)
    k_base = batch * k_stride[0] + kv_head.to(tl.int64) * k_stride[1]
    v_base = batch * v_stride[0] + kv_head.to(tl.int64) * v_stride[1]
    i_position = positions_of(q_position, q_position_stride, batch, head, i, queries)
    if documents is not None:
        documents += batch * queries
        i_document, first_document, last_document = document_range(documents, i, queries)
        low, high = entries_of_documents(
            entries, low, high, documents, first_document, last_document, keys, BLOCK_J,
            group, k_run, k_step, k_first, K_ORDER)  # fmt: skip

    dq = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    upcoming = tl.load(entries + low)
    for entry in tl.range(low, high, num_stages=STAGES):
        tile, upcoming = upcoming, tl.load(entries + entry + 1)
        j_slot = (tile >> 1) * BLOCK_J
        j = token_of(j_slot + tl.arange(0, BLOCK_J), group, k_run, k_step, k_first, K_ORDER)
        k_tile = load_tile(
            k, k_base, batch.to(tl.int32), kv_head, j_slot, group, k_run, k_first, j, keys,
            k_stride[2], d, k_stride[3], D, TMA, K_ORDER)  # fmt: skip
        v_tile = load_tile(
            v, v_base, batch.to(tl.int32), kv_head, j_slot, group, k_run, k_first, j, keys,
            v_stride[2], dv, v_stride[3], DV, TMA, K_ORDER)  # fmt: skip
        score = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        dweight = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        weight = tl.exp2(score * (scale * LOG2_E) - lse[:, None])
        dscore = weight * (dweight - shift[:, None])
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
            dscore = tl.where(seen, dscore, 0.0)
        dq = tl.dot(dscore.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)

    dq = dq * scale
    base = batch * dq_stride[0] + head.to(tl.int64) * dq_stride[1]
    if CUT:
        if slot >= 0:
            part = (tl.program_id(0) // work).to(tl.int64) * slots + slot
            _write_piece(part_ptr, part, dq, d, BLOCK_I, D)
        else:
            _add(dq_ptr, prior_ptr, base, dq, i, queries, dq_stride[2], d, D)
    else:
        _add(dq_ptr, prior_ptr, base, dq, i, queries, dq_stride[2], d, D)


@kernel
def key_kernel(
    q, k_ptr, v_ptr, dout, shift_ptr, lse2_ptr, dk_ptr, dv_ptr, dk_prior_ptr, dv_prior_ptr,
    dk_part_ptr, dv_part_ptr,
    q_stride, k_stride, v_stride, dout_stride, dk_stride, dv_stride,
    sharing, items, entries, table, head_of, documents, q_position, k_position,
    q_position_stride, k_position_stride, table_stride,
    scale, heads, launch_heads, work, slots, rows, queries, keys,
    q_step, k_run, k_step, k_first,
    RULE: tl.constexpr, PER_HEAD: tl.constexpr,
    K_ORDER: tl.constexpr, Q_ORDER: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TMA: tl.constexpr, CUT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, summed over the query heads that share them.

    ``head_of`` lists the key heads (None: all), and ``sharing (key heads, SHARED)`` the query heads
    of each, -1 where there are fewer (None: query head n has key head n).
    """
    item, kv_head, batch = head_and_batch(tl.program_id(0), work, head_of, launch_heads)
    # Rows and slots are the same for every head.
    row, low, high, slot = work_item(items, item, kv_head, work, False)

    group = row // rows
    j_slot = row % rows * BLOCK_J + tl.arange(0, BLOCK_J)
    j = token_of(j_slot, group, k_run, k_step, k_first, K_ORDER)
    d, d_value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_ptr += batch * k_stride[0] + kv_head.to(tl.int64) * k_stride[1]
    v_ptr += batch * v_stride[0] + kv_head.to(tl.int64) * v_stride[1]
    k = load_rows(k_ptr, j, keys, k_stride[2], d, k_stride[3], D)
    v = load_rows(v_ptr, j, keys, v_stride[2], d_value, v_stride[3], DV)
    j_position = positions_of(k_position, k_position_stride, batch, kv_head, j, keys)
    if documents is not None:
        documents += batch * queries
        j_document, first_document, last_document = document_range(documents, j, keys)

    dk = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_J, BLOCK_DV), tl.float32)
    for n in range(SHARED):
        head = kv_head
        if sharing is not None:
            head = tl.load(sharing + tl.program_id(0) // work % launch_heads * SHARED + n)
        if PER_HEAD:
            _, low, high, _ = work_item(items, item, tl.maximum(head, 0), work, True)
        first_entry, last_entry = low, tl.where(head < 0, low, high)
        if documents is not None:
            first_entry, last_entry = entries_of_documents(
                entries, first_entry, last_entry, documents, first_document, last_document, queries,
                BLOCK_I, group, 1, q_step, 0, Q_ORDER)  # fmt: skip
        head = tl.maximum(head, 0)
        numbers = read_numbers(table + head * table_stride, RULE)
        q_base = batch * q_stride[0] + head.to(tl.int64) * q_stride[1]
        dout_base = batch * dout_stride[0] + head.to(tl.int64) * dout_stride[1]
        row_base = (batch * heads + head) * queries
        upcoming = tl.load(entries + first_entry)
        next_lse2, next_shift = _lse_and_shift(
            lse2_ptr + row_base, shift_ptr + row_base, upcoming, queries, group, q_step,
            BLOCK_I, Q_ORDER)  # fmt: skip
        for entry in tl.range(first_entry, last_entry, num_stages=STAGES):
            tile, lse2, shift = upcoming, next_lse2, next_shift
            upcoming = tl.load(entries + entry + 1)
            next_lse2, next_shift = _lse_and_shift(
                lse2_ptr + row_base, shift_ptr + row_base, upcoming, queries, group, q_step,
                BLOCK_I, Q_ORDER)  # fmt: skip
            i_slot = (tile >> 1) * BLOCK_I
            i = token_of(i_slot + tl.arange(0, BLOCK_I), group, 1, q_step, 0, Q_ORDER)
            q_tile = load_tile(
                q, q_base, batch.to(tl.int32), head, i_slot, group, 1, 0, i, queries,
                q_stride[2], d, q_stride[3], D, TMA, Q_ORDER)  # fmt: skip
            dout_tile = load_tile(
                dout, dout_base, batch.to(tl.int32), head, i_slot, group, 1, 0, i, queries,
                dout_stride[2], d_value, dout_stride[3], DV, TMA, Q_ORDER)  # fmt: skip
            dout_tile = dout_tile.to(q_tile.dtype)
            score = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)  # (j, i)
            weight = tl.exp2(score * (scale * LOG2_E) - lse2[None, :])
            whole = tile & 1
            if documents is not None:
                whole = whole & (first_document == last_document)
                whole = whole & is_of_document(documents, i, queries, first_document)
            if whole == 0:
                i_position = positions_of(q_position, q_position_stride, batch, head, i, queries)
                seen = is_visible(i_position[None, :], j_position[:, None], numbers, RULE)
                if documents is not None:
                    i_document = tl.load(documents + i, mask=i < queries, other=-2)
                    seen = seen & (i_document[None, :] == j_document[:, None])
                weight = tl.where(seen, weight, 0.0)
            dweight = tl.dot(v, tl.trans(dout_tile), input_precision=PRECISION)
            dv = tl.dot(weight.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
            dscore = weight * (dweight - shift[None, :])
            if whole == 0:  # 0 * inf, where an unseen value is huge
                dscore = tl.where(weight == 0.0, 0.0, dscore)
            dk = tl.dot(dscore.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)

    dk = dk * scale
    dk_base = batch * dk_stride[0] + kv_head.to(tl.int64) * dk_stride[1]
    dv_base = batch * dv_stride[0] + kv_head.to(tl.int64) * dv_stride[1]
    if CUT:
        if slot >= 0:
            part = (tl.program_id(0) // work).to(tl.int64) * slots + slot
            _write_piece(dk_part_ptr, part, dk, d, BLOCK_J, D)
            _write_piece(dv_part_ptr, part, dv, d_value, BLOCK_J, DV)
        else:
            _add(dk_ptr, dk_prior_ptr, dk_base, dk, j, keys, dk_stride[2], d, D)
            _add(dv_ptr, dv_prior_ptr, dv_base, dv, j, keys, dv_stride[2], d_value, DV)
    else:
        _add(dk_ptr, dk_prior_ptr, dk_base, dk, j, keys, dk_stride[2], d, D)
        _add(dv_ptr, dv_prior_ptr, dv_base, dv, j, keys, dv_stride[2], d_value, DV)


@triton.jit
def _lse_and_shift(lse2_ptr, shift_ptr, entry, queries, group, q_step,
                 BLOCK_I: tl.constexpr, Q_ORDER: tl.constexpr):  # fmt: skip
    """``lse2`` and ``shift`` of an entry's queries, ``(BLOCK_I)`` each.

    The compiler pipelines the loads of tiles, not of these; the loop asks for them a tile ahead.
    """
    i = token_of((entry >> 1) * BLOCK_I + tl.arange(0, BLOCK_I), group, 1, q_step, 0, Q_ORDER)
    lse2 = tl.load(lse2_ptr + i, mask=i < queries, other=float("inf"))
    return lse2, tl.load(shift_ptr + i, mask=i < queries, other=0.0)


@triton.jit
def _add(dx_ptr, prior_ptr, base, dx, token, limit, token_stride, d, D: tl.constexpr):
    """Store rows of a gradient, added to the passes before if there were any."""
    if prior_ptr is not None:
        dx += load_rows(prior_ptr + base, token, limit, token_stride, d, 1, D)
    store_rows(dx_ptr + base, dx, token, limit, token_stride, d, D)


@triton.jit
def _write_piece(part_ptr, part, dx, d, BLOCK: tl.constexpr, D: tl.constexpr):
    store_rows(part_ptr + part * BLOCK * D, dx, tl.arange(0, BLOCK), BLOCK, D, d, D)


@kernel
def sum_pieces_kernel(
    dx_ptr, prior_ptr, part_ptr, dx_stride, pieces_of, head_of,
    launch_heads, work, slots, rows, tokens, run, step, first,
    ORDER: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Add up the pieces of ROWS tokens of a row that was cut, PIECES at a time, in one order."""
    chunks: tl.constexpr = BLOCK // ROWS
    item, head, batch = head_and_batch(tl.program_id(0), work * chunks, head_of, launch_heads)
    row = tl.load(pieces_of + 3 * (item // chunks))
    slot = tl.load(pieces_of + 3 * (item // chunks) + 1)
    pieces = tl.load(pieces_of + 3 * (item // chunks) + 2)
    r, d = item % chunks * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    token = token_of(row % rows * BLOCK + r, row // rows, run, step, first, ORDER)
    base = batch * dx_stride[0] + head.to(tl.int64) * dx_stride[1]
    slot += (tl.program_id(0) // (work * chunks)).to(tl.int64) * slots
    dx = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first_piece in range(0, pieces, PIECES):
        n = first_piece + tl.arange(0, PIECES)
        line = (slot + n)[:, None] * BLOCK + r[None, :]
        address = part_ptr + line[:, :, None] * D + d[None, None, :]
        exists = (n < pieces)[:, None, None] & (line >= 0)[:, :, None] & (d < D)[None, None, :]
        dx += tl.sum(tl.load(address, mask=exists, other=0.0), axis=0)
    _add(dx_ptr, prior_ptr, base, dx, token, tokens, dx_stride[2], d, D)
