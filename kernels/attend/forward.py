"""Forward pass in Triton: a program per (batch, head, tile of queries) visits its tiles of keys."""

import triton
import triton.language as tl

from kernels.attend.visit import (
    SHORT,
    head_and_batch,
    is_whole,
    own_positions,
    part_number,
    query_row,
    seen_cells,
    starts_of,
    store_part,
)
from kernels.common.jit import kernel
from kernels.common.loads import load_rows, load_tile, store_rows, token_of
from kernels.common.softmax import LOG2_E, merge_pair, softmax_step
from kernels.patterns.rule_tree import read_numbers


@kernel
def forward_kernel(
    q, k, v, k_boxes, v_boxes, out, lse_ptr, previous, part_ptr, part_lse_ptr,
    lists, table, documents, q_position, k_position, scale,
    table_stride, kv_group, heads, launch_heads, work, parts, rows, num_queries, num_keys,
    q_step, q_first, k_run, k_step, k_first,
    RULE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Attend: a program takes a tile of queries, or several of short documents, in turn."""
    item, head, batch = head_and_batch(tl.program_id(0), work, lists.head_of, launch_heads)
    if documents is not None:
        documents += batch * num_queries
    given = (
        q, k, v, k_boxes, v_boxes, out, lse_ptr, previous, part_ptr, part_lse_ptr,
        lists, table, documents, q_position, k_position, scale,
        table_stride, kv_group, heads, work, parts, rows, num_queries, num_keys,
        q_step, q_first, k_run, k_step, k_first,
    )  # fmt: skip
    if C.TILES == SHORT:
        for n in range(item, tl.load(lists.count + batch), work):
            _attend_tile(n, head, batch, given, RULE, C)
    else:
        _attend_tile(item, head, batch, given, RULE, C)


@triton.jit
def _attend_tile(item, head, batch, given, RULE: tl.constexpr, C: tl.constexpr):
    """Output of a tile of queries, or of a part of its row: long rows are cut.

    A whole row (part < 0) is written to ``out`` and ``lse``, merged with the pass before it if
    there was one (its output in ``previous``, its lse in ``lse``).
    """
    (
        q, k, v, k_boxes, v_boxes, out, lse_ptr, previous, part_ptr, part_lse_ptr,
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
    i_position = own_positions(q_position, batch, head, i, i_place, q_end, own, C.TILES)

    row_max = tl.full((BLOCK_I,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_I,), tl.float32)
    acc = tl.zeros((BLOCK_I, BLOCK_DV), tl.float32)
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
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        last = base + token_of(index + BLOCK_J - 1, k_order, C.K_ORDER)
        whole = is_whole(tile, documents, own, j, k_end, C.TILES) & (last < k_end)
        if whole == 0:
            seen = seen_cells(
                i_position, q_position, k_position, batch, kv_head, numbers, documents, own, starts,
                j, place, k_end, RULE, False, C.TILES)  # fmt: skip
            score = tl.where(seen & (place < k_end - base)[None, :], score, float("-inf"))
        weight, shrink, row_max, row_sum = softmax_step(score, row_max, row_sum, scale * LOG2_E)
        v_tile = load_tile(
            v, v_boxes, batch, kv_head, base + index, k_order, j, k_end, dv, C.DV, C.K_ORDER
        )
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")

    seen_any = row_sum > 0
    row_sum = tl.where(seen_any, row_sum, 1.0)
    acc = acc / row_sum[:, None]
    lse = tl.where(seen_any, row_max * scale + tl.log2(row_sum) / LOG2_E, float("-inf"))
    lse_ptr += (batch * heads + head) * num_queries
    if C.CUT:
        if part >= 0:
            number = part_number(part, work, parts)
            store_part(part_ptr, number, acc, dv, BLOCK_I, C.DV)
            tl.store(part_lse_ptr + number * BLOCK_I + tl.arange(0, BLOCK_I), lse)
    if part < 0:
        write_output(out, lse_ptr, previous, acc, lse, batch, head, i, q_end, dv, C.DV)


@triton.jit
def write_output(out, lse_ptr, previous, value, lse, batch, head, i, limit, dv,
                 DV: tl.constexpr):  # fmt: skip
    """Store rows of the output, merged with the pass before if there was one.

    ``lse_ptr`` is the address of the lse of this batch and head.
    """
    if previous is not None:
        previous_value = load_rows(previous, batch, head, i, limit, dv, DV)
        previous_lse = tl.load(lse_ptr + i, mask=i < limit, other=float("-inf"))
        value, lse = merge_pair(previous_value, previous_lse, value, lse)
    store_rows(out, value, batch, head, i, limit, dv, DV)
    tl.store(lse_ptr + i, lse, mask=i < limit)
