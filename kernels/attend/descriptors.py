"""Descriptors of boxes of memory, from which Hopper's copy engine (TMA) loads tiles."""

import functools

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.common.interpreter import INTERPRETED
from kernels.patterns.order import Listed, Order


def boxes_of(
    order: Order, rows: int, x: Tensor, columns_x: int, y: Tensor, columns_y: int
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:  # fmt: skip
    """Descriptors of ``x`` and ``y (B, H, tokens, D)``, both None where there can be none.

    The copy engine needs 16-byte strides, and whole blocks if the tokens are in an order of their
    own. Listed tokens have no blocks.

    Args:
        order: the order in which tokens are taken.
        rows, columns_x, columns_y: tokens and numbers of a tile.
    """
    # In float32 the products are no tensor-core instructions, and need all registers as it is:
    # with descriptors the dQ kernel at D=128 spills 5,632 bytes a thread.
    if not has_copy_engine(x.device) or x.dtype == torch.float32 or isinstance(order, Listed):
        return None, None
    boxes = []
    for t, columns in ((x, columns_x), (y, columns_y)):
        box = _box(tuple(t.shape), t.stride(), t.element_size(), order, rows, columns)
        if box is None or t.data_ptr() % 16:
            return None, None
        boxes.append(TensorDescriptor(t, *box))
    return tuple(boxes)


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache(maxsize=1024)
def _box(shape, stride, size: int, order: Order, rows: int, columns: int):
    """Shape, strides and box of a descriptor of ``(B, H, tokens, D)``, None if there can be none.

    Args:
        size: bytes of a number.
        rows, columns: tokens and numbers of a tile.
    """
    B, H, L, D = shape
    whole = L % order.step == 0 and rows % order.run == 0 and order.run & (order.run - 1) == 0
    steps = [s * size for n, s in zip(shape[:3], stride[:3], strict=True) if n > 1]
    aligned = all(0 < s < 2**40 and s % 16 == 0 for s in steps) and D * size >= 16
    if not (whole and aligned and stride[3] == 1):
        return None
    # The stride of a dimension of one is never used, but must be valid.
    b, h, t = (s if n > 1 else 16 for n, s in zip(shape[:3], stride[:3], strict=True))
    if order == Order():
        return [B, H, L, D], [b, h, t, 1], [1, 1, rows, columns]
    blocks = [B, H, L // order.step, order.step, D]
    tokens = rows // order.run
    return blocks, [b, h, t * order.step, t, 1], [1, 1, tokens, order.run, columns]
