"""How long a pattern can still reach each key, and where decoding keeps it until then."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common.kept import kept
from kernels.patterns.algebra import Pattern
from kernels.patterns.find_tiles import CELLS
from kernels.patterns.tiles import last_visitor

_QUERIES = 256  # of a tile, one key wide: few tiles a key, and few cells in the last one
_GPU_CELLS = 2**20  # the same on a GPU, where launches count for more


@dataclass(frozen=True, eq=False)
class CachePlan:
    """Which keys decoding keeps, and where, when query ``i`` comes with key ``i``.

    A key is kept from its own query to the last one that sees it; then its slot is free. Hence
    ``causal() & window(w)`` is a ring of ``w`` slots. ``causal() & fixed(l, c)`` keeps the query's
    block and ``c`` keys of each block before it: a sequence of ``n`` tokens needs
    ``l + c (n / l - 1)`` slots.

    Args:
        pattern: which keys are visible.
        last: the last query that sees each key, ``(heads, length)`` int64; -1 where none does.
        slot: where each key is kept, ``(heads, length)`` int64.
        kept: most keys kept at once, which is the number of slots, ``(heads)`` int64.
    """

    pattern: Pattern
    last: Tensor
    slot: Tensor
    kept: Tensor

    def held(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Head and number of each of the first ``tokens`` keys that a later query sees."""
        return (self.last[:, :tokens] >= tokens).nonzero(as_tuple=True)

    def steps(self, tokens: int, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
        """For each query after the first ``tokens``: its key's slot, and the slots that it sees.

        Slots ``(heads)`` int64, and ``(heads, most slots)`` bool, contiguous.
        """
        heads, length = self.slot.shape
        slots = int(self.kept.max())
        numbers = torch.arange(heads)[:, None] if self.pattern.differs_by_head else 0
        head, slot = torch.arange(heads, device=device), self.slot.T.contiguous().to(device)
        position = torch.full((heads, slots), -1, device=device)  # of the key in each slot
        of_head, key = (x.to(device) for x in self.held(tokens))
        position[of_head, slot[key, of_head]] = key
        cells = CELLS if head.device.type == "cpu" else _GPU_CELLS
        ahead = max(1, cells // (heads * slots))  # queries at once: few operations a token
        for first in range(tokens, length, ahead):
            i = torch.arange(first, min(first + ahead, length), device=device)
            then = position.repeat(len(i), 1, 1)
            then[(i - first)[:, None], head, slot[i]] = i[:, None]
            then = then.cummax(dim=0).values  # the last key that came to the slot
            seen = self.pattern.visible(i[:, None, None], then.clamp(min=0), numbers, length=length)
            yield from zip(slot[i], seen & (then >= 0), strict=True)
            position = then[-1]


@kept(maxsize=64)
def cache_plan(pattern: Pattern, heads: int, length: int) -> CachePlan:
    """Plan the cache of every head for a sequence of ``length`` tokens.

    Takes the memory of the tiles of 256 queries and one key that a head visits, never
    ``length x length``.

    Raises:
        ValueError: if a query may see a later key.
    """
    if not pattern.is_causal:
        raise ValueError(
            f"one token after the other needs a causal pattern, got {pattern!r}; put `causal() &` "
            f"before it."
        )
    last = last_queries(pattern, heads, length)
    key = torch.arange(length).expand(heads, length)
    until = torch.maximum(last, key)
    leaving = torch.stack([torch.bincount(row, minlength=length) for row in until])
    gone = leaving.cumsum(dim=1) - leaving  # before each query
    kept = (key + 1 - gone).amax(dim=1)
    return CachePlan(pattern, last, _slots(until, kept[:, None]), kept)


def last_queries(pattern: Pattern, heads: int, length: int) -> Tensor:
    """The last query that sees each key, ``(heads, length)`` int64; -1 where none does."""
    pattern = pattern.bound()
    different = heads if pattern.differs_by_head else 1
    last = torch.stack([_last_queries(pattern, head, length) for head in range(different)])
    return last.expand(heads, length)


def _last_queries(pattern: Pattern, head: int, length: int) -> Tensor:
    tile = last_visitor(pattern, head, length, _QUERIES)
    last = []
    for j in torch.arange(length)[:, None].split(CELLS // _QUERIES):
        i = tile[j] * _QUERIES + torch.arange(_QUERIES)
        exists = (i >= 0) & (i < length)
        seen = pattern.visible(i.clamp(0, length - 1), j, head, length=length) & exists
        last.append(torch.where(seen, i, -1).amax(dim=1))
    return torch.cat(last)


def _slots(until: Tensor, kept: Tensor) -> Tensor:
    """A slot for each key, ``(heads, length)``, of ``kept (heads, 1)`` that there are.

    Key ``n`` takes the slot that has been free for longest. First come the unused ones in turn, so
    from key ``kept`` on it is the one of the key that left as number ``n - kept``.
    """
    key = torch.arange(until.shape[1]).expand(until.shape)
    left = until.argsort(dim=1, stable=True)
    slot = torch.where(key < kept, key, left.gather(1, (key - kept).clamp(min=0)))
    while (slot >= kept).any():  # back to the first key of the slot, in steps that double
        slot = slot.gather(1, slot)
    return slot
