"""Backward pass in Triton: dQ over the tile list, then dK and dV over its inverse; no atomics.

With ``P = exp(S - lse)`` of the *whole* attention, every pass of a pattern adds its own tiles:
``dS = P (dP - shift)``, ``shift = sum(dout * out) - dlse`` (FlashAttention-2, Dao 2023,
arXiv:2307.08691, with the gradient through lse added).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.attend.visit import (
    LONG,
    ROW,
    SHORT,
    document_entries,
    document_item,
    head_and_batch,
    is_whole,
    narrowed,
    own_documents,
    own_positions,
    part_number,
    query_row,
    seen_cells,
    starts_of,
    store_part,
    work_item,
)
from kernels.common.jit import kernel
from kernels.common.loads import load_rows, load_tile, store_rows, token_of
from kernels.common.softmax import LOG2_E
from kernels.patterns.rule_tree import read_numbers


class RowStats(NamedTuple):
    """What every pass needs of each query, ``(B, H, L)`` float32 each.

    Args:
        shift: the sum of dout * out, less dlse.
        lse2: the lse in base 2, infinite for queries that see nothing: exp2(score - lse2) is 0.
    """

    shift: Tensor
    lse2: Tensor


@kernel
def dq_kernel(
    q, k, v, k_boxes, v_boxes, out, dout, lse_ptr, dlse_ptr, row_stats, dq, previous, part_ptr,
    lists, table, documents, q_position, k_position, scale,
    table_stride, kv_group, heads, launch_heads, work, parts, rows, num_queries, num_keys,
    q_step, q_first, k_run, k_step, k_first,
    RULE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries: a program takes a tile, or several of short documents, in turn."""
    item, head, batch = head_and_batch(tl.program_id(0), work, lists.head_of, launch_heads)
    if documents is not None:
        documents += batch * num_queries
    given = (
        q, k, v, k_boxes, v_boxes, out, dout, lse_ptr, dlse_ptr, row_stats, dq, previous, part_ptr,
        lists, table, documents, q_position, k_position, scale,
        table_stride, kv_group, heads, work, parts, rows, num_queries, num_keys,
        q_step, q_first, k_run, k_step, k_first,
    )  # fmt: skip
    if C.TILES == SHORT:
        for n in range(item, tl.load(lists.count + batch), work):
            _dq_tile(n, head, batch, given, RULE, C)
    else:
        _dq_tile(item, head, batch, given, RULE, C)


@triton.jit
def _dq_tile(item, head, batch, given, RULE: tl.constexpr, C: tl.constexpr):
    """Gradient of a tile of queries. The first pass of a chain also fills ``row_stats``."""
    (
        q, k, v, k_boxes, v_boxes, out, dout, lse_ptr, dlse_ptr, row_stats, dq, previous, part_ptr,
        lists, table, documents, q_position, k_position, scale,
        table_stride, kv_group, heads, work, parts, rows, num_queries, num_keys,
        q_step, q_first, k_run, k_step, k_first,
    ) = given  # fmt: skip
    BLOCK_I: tl.constexpr = C.BLOCK_I
    BLOCK_J: tl.constexpr = C.BLOCK_J
    BLOCK_D: tl.constexpr = C.BLOCK_D
    BLOCK_DV: tl.constexpr = C.BLOCK_DV
    i, i_place, q_end, own, base, k_end, k_order, low, high, part = query_row(
        lists, item, head, batch, work, rows, documents, num_queries, num_keys,
        q_step, q_first, k_run, k_step, k_first, C)  # fmt: skip
    numbers = read_numbers(table + head * table_stride, RULE)
    kv_head = head // kv_group
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_tile = load_rows(q, batch, head, i, q_end, d, C.D)
    dout_tile = load_rows(dout, batch, head, i, q_end, dv, C.DV)
    row_base = (batch * heads + head) * num_queries
    if previous is not None:
        shift = tl.load(row_stats.shift + row_base + i, mask=i < q_end, other=0.0)
        lse = tl.load(row_stats.lse2 + row_base + i, mask=i < q_end, other=float("inf"))
    else:
        lse = tl.load(lse_ptr + row_base + i, mask=i < q_end, other=float("-inf"))
        blind = lse == float("-inf")
        lse = tl.where(blind, float("inf"), lse * LOG2_E)
        out_tile = load_rows(out, batch, head, i, q_end, dv, C.DV)
        shift = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), axis=1)
        if dlse_ptr is not None:
            shift -= tl.load(dlse_ptr + row_base + i, mask=i < q_end, other=0.0)
        shift = tl.where(blind, 0.0, shift)
        tl.store(row_stats.shift + row_base + i, shift, mask=i < q_end)
        tl.store(row_stats.lse2 + row_base + i, lse, mask=i < q_end)
    dout_tile = dout_tile.to(q_tile.dtype)
    i_position = own_positions(q_position, batch, head, i, i_place, q_end, own, C.TILES)

    acc = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    upcoming = tl.load(lists.entries + low)
    for entry in tl.range(low, high, num_stages=C.STAGES):
        tile, upcoming = upcoming, tl.load(lists.entries + entry + 1)
        index = (tile >> 1) * BLOCK_J
        place = token_of(index + tl.arange(0, BLOCK_J), k_order, C.K_ORDER)
        j = base + place
        starts = starts_of(documents, j, k_end, C.TILES)
        k_tile = load_tile(
            k, k_boxes, batch, kv_head, base + index, k_order, j, k_end, d, C.D, C.K_ORDER
        )
        v_tile = load_tile(
            v, v_boxes, batch, kv_head, base + index, k_order, j, k_end, dv, C.DV, C.K_ORDER
        )
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        dweight = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        weight = tl.exp2(score * (scale * LOG2_E) - lse[:, None])
        dscore = weight * (dweight - shift[:, None])
        last = base + token_of(index + BLOCK_J - 1, k_order, C.K_ORDER)
        whole = is_whole(tile, documents, own, j, k_end, C.TILES) & (last < k_end)
        if whole == 0:
            seen = seen_cells(
                i_position, q_position, k_position, batch, kv_head, numbers, documents, own, starts,
                j, place, k_end, RULE, False, C.TILES)  # fmt: skip
            dscore = tl.where(seen & (place < k_end - base)[None, :], dscore, 0.0)
        acc = tl.dot(dscore.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    acc = acc * scale
    if C.CUT:
        if part >= 0:
            store_part(part_ptr, part_number(part, work, parts), acc, d, BLOCK_I, C.D)
    if part < 0:
        add_rows(dq, previous, acc, batch, head, i, q_end, d, C.D)


@kernel
def dkv_kernel(
    q, k, v, q_boxes, dout_boxes, dout, row_stats, dk, dv, dk_previous, dv_previous,
    dk_part_ptr, dv_part_ptr, sharing,
    lists, table, documents, q_position, k_position, scale,
    table_stride, kv_group, heads, launch_heads, work, parts, rows, num_queries, num_keys,
    q_step, q_first, k_run, k_step, k_first,
    RULE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values: a program takes a tile, or several of short documents, in turn.

    ``lists.head_of`` lists the key heads (None: all), and ``sharing (key heads, C.SHARED)`` the
    query heads of each, -1 where there are fewer (None: query head n has key head n).
    """
    item, kv_head, batch = head_and_batch(tl.program_id(0), work, lists.head_of, launch_heads)
    if documents is not None:
        documents += batch * num_queries
    given = (
        q, k, v, q_boxes, dout_boxes, dout, row_stats, dk, dv, dk_previous, dv_previous,
        dk_part_ptr, dv_part_ptr, sharing,
        lists, table, documents, q_position, k_position, scale,
        table_stride, heads, launch_heads, work, parts, rows, num_queries, num_keys,
        q_step, q_first, k_run, k_step, k_first,
    )  # fmt: skip
    if C.TILES == SHORT:
        for n in range(item, tl.load(lists.count + batch), work):
            _dkv_tile(n, kv_head, batch, given, RULE, C)
    else:
        _dkv_tile(item, kv_head, batch, given, RULE, C)


@triton.jit
def _dkv_tile(item, kv_head, batch, given, RULE: tl.constexpr, C: tl.constexpr):
    """Gradients of a tile of keys and values, summed over the query heads that share them."""
    (
        q, k, v, q_boxes, dout_boxes, dout, row_stats, dk, dv, dk_previous, dv_previous,
        dk_part_ptr, dv_part_ptr, sharing,
        lists, table, documents, q_position, k_position, scale,
        table_stride, heads, launch_heads, work, parts, rows, num_queries, num_keys,
        q_step, q_first, k_run, k_step, k_first,
    ) = given  # fmt: skip
    BLOCK_I: tl.constexpr = C.BLOCK_I
    BLOCK_J: tl.constexpr = C.BLOCK_J
    BLOCK_D: tl.constexpr = C.BLOCK_D
    BLOCK_DV: tl.constexpr = C.BLOCK_DV
    if C.TILES == ROW:
        # Rows and parts are the same for every head.
        row, low, high, part = work_item(lists.items, item, kv_head, work, False, C.CUT)
        base, q_end, k_end = 0, num_queries, num_keys
        residue = row // rows
        q_order, k_order = (residue, 1, q_step, q_first), (residue, k_run, k_step, k_first)
        j = token_of(row % rows * BLOCK_J + tl.arange(0, BLOCK_J), k_order, C.K_ORDER)
        j_place, own = j, own_documents(documents, j, num_keys)
    else:
        q_order, k_order = (0, 1, q_step, q_first), (0, k_run, k_step, k_first)
        first, k_end, base, q_end, row, part, piece, pieces = document_item(
            lists, item, batch, C.TILES
        )
        j_place = token_of(row * BLOCK_J + tl.arange(0, BLOCK_J), k_order, C.K_ORDER)
        j = first + j_place
        own = starts_of(documents, j, k_end, C.TILES)
    d, d_value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_tile = load_rows(k, batch, kv_head, j, k_end, d, C.D)
    v_tile = load_rows(v, batch, kv_head, j, k_end, d_value, C.DV)
    j_position = own_positions(k_position, batch, kv_head, j, j_place, k_end, own, C.TILES)

    dk_acc = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_J, BLOCK_DV), tl.float32)
    for n in range(C.SHARED):
        head = kv_head
        if sharing is not None:
            head = tl.load(sharing + tl.program_id(0) // work % launch_heads * C.SHARED + n)
        exists, head = head >= 0, tl.maximum(head, 0)
        if C.TILES == ROW:
            if C.PER_HEAD:
                _, low, high, _ = work_item(lists.items, item, head, work, True, False)
            start, stop = narrowed(
                lists.entries, low, high, documents, own, num_queries, q_order, BLOCK_I, C.Q_ORDER
            )
        else:
            start, stop = document_entries(
                lists, head, row, rows, q_end - base, piece, pieces, q_order, BLOCK_I, C.Q_ORDER,
                C.PER_HEAD, C.TILES)  # fmt: skip
        stop = tl.where(exists, stop, start)
        numbers = read_numbers(table + head * table_stride, RULE)
        row_base = (batch * heads + head) * num_queries
        upcoming = tl.load(lists.entries + start)
        next_lse2, next_shift = _stats_of_entry(
            row_stats, row_base, upcoming, base, q_end, q_order, BLOCK_I, C.Q_ORDER
        )
        for entry in tl.range(start, stop, num_stages=C.STAGES):
            tile, lse2, shift = upcoming, next_lse2, next_shift
            upcoming = tl.load(lists.entries + entry + 1)
            next_lse2, next_shift = _stats_of_entry(
                row_stats, row_base, upcoming, base, q_end, q_order, BLOCK_I, C.Q_ORDER
            )
            index = (tile >> 1) * BLOCK_I
            place = token_of(index + tl.arange(0, BLOCK_I), q_order, C.Q_ORDER)
            i = base + place
            starts = starts_of(documents, i, q_end, C.TILES)
            q_tile = load_tile(
                q, q_boxes, batch, head, base + index, q_order, i, q_end, d, C.D, C.Q_ORDER
            )
            dout_tile = load_tile(
                dout, dout_boxes, batch, head, base + index, q_order, i, q_end, d_value, C.DV,
                C.Q_ORDER)  # fmt: skip
            dout_tile = dout_tile.to(q_tile.dtype)
            score = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # (j, i)
            weight = tl.exp2(score * (scale * LOG2_E) - lse2[None, :])
            whole = is_whole(tile, documents, own, i, q_end, C.TILES)
            if C.TILES == LONG:  # what a tile holds of the next document
                whole = whole & (index + BLOCK_I <= q_end - base)
            if whole == 0:
                seen = seen_cells(
                    j_position, k_position, q_position, batch, head, numbers, documents, own,
                    starts, i, place, q_end, RULE, True, C.TILES)  # fmt: skip
                if C.TILES == LONG:
                    seen = seen & (place < q_end - base)[None, :]
                weight = tl.where(seen, weight, 0.0)
            dweight = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
            dv_acc = tl.dot(weight.to(dout_tile.dtype), dout_tile, dv_acc, input_precision="ieee")
            dscore = weight * (dweight - shift[None, :])
            if whole == 0:  # 0 * inf, where an unseen value is huge
                dscore = tl.where(weight == 0.0, 0.0, dscore)
            dk_acc = tl.dot(dscore.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

    dk_acc = dk_acc * scale
    if C.CUT:
        if part >= 0:
            number = part_number(part, work, parts)
            store_part(dk_part_ptr, number, dk_acc, d, BLOCK_J, C.D)
            store_part(dv_part_ptr, number, dv_acc, d_value, BLOCK_J, C.DV)
    if part < 0:
        add_rows(dk, dk_previous, dk_acc, batch, kv_head, j, k_end, d, C.D)
        add_rows(dv, dv_previous, dv_acc, batch, kv_head, j, k_end, d_value, C.DV)


@triton.jit
def _stats_of_entry(row_stats, row_base, entry, base, q_end, q_order, BLOCK_I: tl.constexpr,
                    Q_ORDER: tl.constexpr):  # fmt: skip
    """``lse2`` and ``shift`` of an entry's queries, ``(BLOCK_I)`` each.

    The compiler pipelines the loads of tiles, not of these; the loop asks for them a tile ahead.
    """
    i = base + token_of((entry >> 1) * BLOCK_I + tl.arange(0, BLOCK_I), q_order, Q_ORDER)
    lse2 = tl.load(row_stats.lse2 + row_base + i, mask=i < q_end, other=float("inf"))
    return lse2, tl.load(row_stats.shift + row_base + i, mask=i < q_end, other=0.0)


@triton.jit
def add_rows(dx, previous, value, batch, head, token, limit, d, D: tl.constexpr):
    """Store rows of a gradient, added to the passes before if there were any."""
    if previous is not None:
        value += load_rows(previous, batch, head, token, limit, d, D)
    store_rows(dx, value, batch, head, token, limit, d, D)
