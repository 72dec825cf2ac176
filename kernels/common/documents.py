"""Documents inside kernels: tokens of different ones do not see each other.

``documents (L,)`` hold the first token of each token's document, int32. They do not decrease, so
that a tile holds a range of them, and the entries of a row of tiles that meet a range are found by
a binary search.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.loads import token_of


def first_tokens(documents: Tensor) -> Tensor:
    """The number in its row of the first token of each token's document, ``(B, L)`` int32.

    Args:
        documents: ``(B, L)`` integers; neighbours with one number are of one document.
    """
    begins = torch.nn.functional.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
    number = torch.arange(documents.shape[1], dtype=torch.int32, device=documents.device)
    return torch.where(begins, number, 0).cummax(dim=1).values


@triton.jit
def document_range(documents, token, limit):
    """Documents of a tile's tokens (-1 beyond the limit), and the first and last of them."""
    document = tl.load(documents + token, mask=token < limit, other=-1)
    return document, tl.load(documents + tl.minimum(tl.min(token), limit - 1)), tl.max(document)


@triton.jit
def is_of_document(documents, token, limit, document):
    """Whether all tokens of a tile are of one document."""
    first, last = tl.minimum(tl.min(token), limit - 1), tl.minimum(tl.max(token), limit - 1)
    return (tl.load(documents + first) == document) & (tl.load(documents + last) == document)


@triton.jit
def entries_of_documents(entries, low, high, documents, first_document, last_document, limit, order,
                         TILE: tl.constexpr, ORDER: tl.constexpr):  # fmt: skip
    """Narrow a row of entries to the tiles that hold any token of a range of documents."""
    low = _search(entries, low, high, documents, first_document, limit, order, TILE, False, ORDER)
    high = _search(entries, low, high, documents, last_document, limit, order, TILE, True, ORDER)
    return low, high


@triton.jit
def _search(entries, low, high, documents, document, limit, order, TILE: tl.constexpr,
            PAST: tl.constexpr, ORDER: tl.constexpr):  # fmt: skip
    """The first entry whose tile reaches ``document`` (lies past it if PAST): a binary search,

    since tiles ascend in a row and documents do not decrease.
    """
    while low < high:
        middle = (low + high) // 2
        index = (tl.load(entries + middle) >> 1) * TILE
        edge = index if PAST else index + TILE - 1
        token = tl.minimum(token_of(edge, order, ORDER), limit - 1)
        found = tl.load(documents + token)
        before = (found <= document) if PAST else (found < document)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def entries_before(entries, low, high, limit, order, TILE: tl.constexpr, ORDER: tl.constexpr):
    """One past the last entry of a row whose tile begins before token ``limit``."""
    while low < high:
        middle = (low + high) // 2
        token = token_of((tl.load(entries + middle) >> 1) * TILE, order, ORDER)
        low = tl.where(token < limit, middle + 1, low)
        high = tl.where(token < limit, high, middle)
    return low
