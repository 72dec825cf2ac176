"""The stack of blocks: what stands around an attention, and how activations are kept.

A stack is a list of blocks that runs them one after the other. Each block is compiled by itself
(`training/callbacks/compilation.py`), and what is done to save memory inside a block is part of its
graph.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import Attention, Context
from models.cache import Cache
from models.feed_forward import SwiGLU
from models.norms import make_norm


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``; dropout on what is added.

    This is the residual form of the Sparse Transformer too (Child et al. 2019, section 5.2).

    Args:
        attention: of this layer.
        dim: width of the residual stream.
        feed_forward: constructor, called with ``dim``.
        norm: ``"rms"`` or ``"layer"``.
        dropout: probability.

    Raises:
        ValueError: if the norm is unknown or ``dropout`` not in [0, 1).
    """

    recompute = False  # keep only the input for the backward pass, and run again there

    def __init__(
        self,
        attention: Attention,
        dim: int,
        *,
        feed_forward: Callable[[int], nn.Module] = SwiGLU,
        norm: str = "rms",
        dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(
                f"dropout must be at least 0 and below 1, got model.block.dropout={dropout}."
            )
        self.attention_norm, self.feed_forward_norm = make_norm(norm, dim), make_norm(norm, dim)
        self.attention = attention
        self.feed_forward = feed_forward(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        # In here, so that a compiled block is one graph each way.
        if not (self.recompute and torch.is_grad_enabled()):
            return self._sublayers(x, context)
        with torch.no_grad():  # decided once, and kept
            routing = self.attention.route(self.attention_norm(x), context)
        if routing is not None:
            context = replace(context, routing=routing)
        return checkpoint(self._sublayers, x, context, use_reentrant=False)

    def _sublayers(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), context))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Stack(nn.ModuleList):
    """Blocks that keep what autograd needs of them (``"plain"``)."""

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        """The residual stream ``(B, L, dim)`` after the last block."""
        for number, block in enumerate(self):
            if cache is not None:
                context = replace(context, cache=cache.layers[number])
            x = block(x, context)
        return x


class RecomputedStack(Stack):
    """Blocks that keep their input and their routing alone, and run again in the backward pass."""

    def __init__(self, blocks: Iterable[Block]):
        super().__init__(blocks)
        for block in self:
            block.recompute = True


STACKS = {"plain": Stack, "recompute": RecomputedStack}


def make_stack(name: str, blocks: Iterable[Block]) -> Stack:
    """The stack that ``model.stack`` names.

    Raises:
        ValueError: if there is no such stack.
    """
    if name not in STACKS:
        raise ValueError(f"model.stack must be one of {', '.join(STACKS)}, got {name}.")
    return STACKS[name](blocks)
