"""Loads and stores of tiles inside kernels, and where the tokens of a storage order stand."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# How indices of the storage order map to tokens of the sequence (kernels.patterns.order.Order):
PLAIN = tl.constexpr(0)  # index n is token n
RESIDUES = tl.constexpr(1)  # residue r holds tokens r, r + step, r + 2 step ...
GATHERED = tl.constexpr(2)  # runs of `run` tokens, one every `step` tokens, from `first` on
LISTED = tl.constexpr(3)  # tokens of a table at `first`, filled up with one beyond the limit
TABLE_ENTRIES = 128  # tables have whole multiples: the longest tile may begin at any of its own


class View(NamedTuple):
    """A tensor ``(B, H, tokens, D)`` as a kernel takes it: its address and its strides."""

    ptr: Tensor
    batch: int
    head: int
    token: int
    column: int


def view_of(x: Tensor | None) -> View | None:
    """``x (B, H, tokens, D)`` with its strides; None for None."""
    return None if x is None else View(x, *x.stride())


@triton.jit
def token_of(index, order, ORDER: tl.constexpr):
    """The token at an index of the storage order ``(residue, run, step, first)``."""
    residue, run, step, first = order
    if ORDER == RESIDUES:
        return index * step + residue
    elif ORDER == GATHERED:
        return index // run * step + first + index % run
    elif ORDER == LISTED:
        return tl.load(first + index)
    else:
        return index


@triton.jit
def address_of(x, batch, head):
    """Where one batch and head of a ``View`` tensor begins."""
    return x.ptr + (batch * x.batch + head.to(tl.int64) * x.head)


@triton.jit
def load_rows(x, batch, head, token, limit, d, D: tl.constexpr):
    """Rows ``token`` of a ``View`` tensor, 0 beyond ``limit`` and beyond ``D``."""
    rows = address_of(x, batch, head) + token[:, None].to(tl.int64) * x.token
    mask = (token[:, None] < limit) & (d[None, :] < D)
    return tl.load(rows + d[None, :] * x.column, mask=mask, other=0.0)


@triton.jit
def store_rows(x, value, batch, head, token, limit, d, D: tl.constexpr):
    """Write rows ``token`` of a ``View`` tensor."""
    rows = address_of(x, batch, head) + token[:, None].to(tl.int64) * x.token
    mask = (token[:, None] < limit) & (d[None, :] < D)
    tl.store(rows + d[None, :] * x.column, value.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(x, boxes, batch, head, index, order, token, limit, d, D: tl.constexpr,
              ORDER: tl.constexpr):  # fmt: skip
    """A tile of rows of a ``View`` tensor: the tokens from ``index`` of a storage order on.

    With ``boxes``, by Hopper's copy engine (TMA): a descriptor of ``(B, H, tokens, D)``, or of
    ``(B, H, blocks, tokens of a block, D)`` for an order of its own. Without, through pointers, row
    by row.
    """
    if boxes is not None:
        residue, run, _, first = order
        at = batch.to(tl.int32)
        if ORDER == RESIDUES:
            tile = boxes.load([at, head, index, residue, 0])
        elif ORDER == GATHERED:
            tile = boxes.load([at, head, index // run, first, 0])
        else:
            tile = boxes.load([at, head, index, 0])
        return tile.reshape(token.shape[0], d.shape[0])
    else:
        return load_rows(x, batch, head, token, limit, d, D)
