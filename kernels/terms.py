"""The terms that patterns are made of; `kernels.patterns` has their constructors and rules."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.algebra import Pattern, Surroundings
from kernels.random_plan import draw_blocks


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    is_causal = True

    def _visible(self, i, j, head, length, surroundings):
        return j <= i

    def __repr__(self) -> str:
        return "causal()"


@dataclass(frozen=True, repr=False)
class Window(Pattern):
    left: int
    right: int
    block: int

    @property
    def is_causal(self) -> bool:
        return self.right == 0 and self.block == 1

    def _visible(self, i, j, head, length, surroundings):
        distance = _block_of(i, self.block) - _block_of(j, self.block)
        return (distance <= self.left) & (distance >= -self.right)

    def __repr__(self) -> str:
        width = f"{self.left + 1}" if self.right == 0 else f"{self.left}, {self.right}"
        return f"window({width})" if self.block == 1 else f"window({width}, block={self.block})"


@dataclass(frozen=True, repr=False)
class GlobalTokens(Pattern):
    count: int

    def _visible(self, i, j, head, length, surroundings):
        return (i < self.count) | (j < self.count)

    def __repr__(self) -> str:
        return f"global_tokens({self.count})"


@dataclass(frozen=True, repr=False)
class RandomBlocks(Pattern):
    count: int
    block: int
    seed: int = 0
    layer: int = 0

    differs_by_head = True

    def _visible(self, i, j, head, length, surroundings):
        i_block, j_block = _block_of(i, self.block), _block_of(j, self.block)
        heads = int(head.max() if isinstance(head, Tensor) else head) + 1
        plan = self._plan(surroundings, heads, length, i_block)
        head = head.to(i.device) if isinstance(head, Tensor) else head
        drawn = plan[head, i_block]  # (..., count)
        seen = torch.zeros_like(i + j, dtype=torch.bool)
        for n in range(self.count):
            seen = seen | (drawn[..., n] == j_block)
        return seen

    def _plan(self, surroundings: Surroundings, heads: int, length, i_block: Tensor) -> Tensor:
        """The drawn key blocks, ``(heads, query blocks, count)``, -1 where there were too few."""
        around = surroundings.around
        if around.is_causal:
            # A row does not depend on the length, so that one plan serves many lengths.
            blocks = -(-length // self.block) if length else int(i_block.max()) + 1
            blocks = 1 << (blocks - 1).bit_length()
        elif length is not None:
            blocks = -(-length // self.block)
        else:
            raise ValueError(
                f"{self!r} without causal() depends on the number of tokens, got length=None; "
                f"pass `length`."
            )
        return _random_plan(self, around, surroundings.beside, heads, blocks, str(i_block.device))

    def _without_random(self, replacement):
        return replacement

    def __repr__(self) -> str:
        options = "".join(f", {k}={v}" for k in ("seed", "layer") if (v := getattr(self, k)))
        return f"random_blocks({self.count}, block={self.block}{options})"


@functools.lru_cache(maxsize=256)
def _random_plan(
    term: RandomBlocks,
    around: Pattern,
    beside: Pattern,
    heads: int,
    blocks: int,
    device: str,
) -> Tensor:
    if device != "cpu":
        return _random_plan(term, around, beside, heads, blocks, "cpu").to(device)
    allowed = _touched_blocks(around, term.block, blocks)
    taken = _touched_blocks(around & beside, term.block, blocks)
    numbers_in_hash = () if around.is_causal else (blocks,)
    return draw_blocks(
        allowed & ~taken, term.count, heads, (term.seed, term.layer, *numbers_in_hash)
    )


@functools.lru_cache(maxsize=64)
def _touched_blocks(pattern: Pattern, block: int, blocks: int) -> Tensor:
    """Which blocks hold at least one visible cell, ``(query blocks, key blocks)`` bool."""
    j = torch.arange(blocks * block)[None, :]
    rows = []
    for i in torch.arange(blocks * block)[:, None].split(block):
        seen = pattern.visible(i, j, length=blocks * block).expand(block, blocks * block)
        rows.append(seen.any(dim=0).view(blocks, block).any(dim=1))
    return torch.stack(rows)


def _block_of(position: Tensor, block: int) -> Tensor:
    return position if block == 1 else position // block
