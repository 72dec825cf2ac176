"""Longformer (Beltagy et al. 2020, arXiv:2004.05150): sliding windows and global tokens."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import patterns
from kernels.attend import attend
from kernels.patterns import Pattern
from models.attention import Context
from models.attention.pattern import PatternAttention, prepared
from models.attention.projections import MakeProjections, Projections


class LongformerAttention(PatternAttention):
    """Each token sees a window, which may differ by layer and have gaps in some heads.

    The causal form is that of the paper's character models (section 4): a token and the
    ``window - 1`` before it. Bidirectional (``causal=False``, section 5) the window reaches
    ``window // 2`` to each side; ``attention_window`` of the released code counts one side.

    The leading ``global_tokens`` are seen by every later token. Bidirectional they also see every
    token, through queries, keys and values of their own (section 3.1) that start as copies of the
    others; other tokens see them by the common maps, in one softmax with the window.

    Args:
        causal: later tokens are hidden.
        window: keys of a window; one number, or one for each layer.
        dilation: distance of neighbouring keys in the dilated heads; one number, or one for each
            layer; 1 is no gap.
        dilated_heads: so many heads are dilated, the last ones.
        global_tokens: leading tokens that are global.
        global_projections: whether global tokens have maps of their own; without effect if causal.

    Raises:
        ValueError: if a number cannot be, or a list ends before the last layer.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int,
        *,
        causal: bool = True,
        window: int | Sequence[int] = 512,
        dilation: int | Sequence[int] = 1,
        dilated_heads: int = 2,
        global_tokens: int = 0,
        global_projections: bool = True,
        projections: MakeProjections = Projections,
    ):
        if not 0 <= dilated_heads <= heads or global_tokens < 0:
            raise ValueError(
                f"dilated_heads must be from 0 to heads={heads} and global_tokens at least 0, got "
                f"{dilated_heads} and {global_tokens}."
            )
        lists = {"window": window, "dilation": dilation}
        listed = {name: len(n) for name, n in lists.items() if not isinstance(n, int)}
        shape = {
            "causal": causal,
            "dilation": _of_layer("dilation", dilation, layer),
            "heads": (heads - dilated_heads, dilated_heads),
            "global_tokens": global_tokens,
        }
        window = _of_layer("window", window, layer)
        pattern = _pattern(window, **shape)
        super().__init__(dim, heads, layer, pattern=pattern, projections=projections)
        self._shape = shape
        self.listed = listed  # of how many layers, which the model knows
        self.set_window(window)
        self.global_projections = None
        if global_tokens and global_projections and not causal:
            self.global_projections = copy.deepcopy(self.projections)
            self.global_projections.out = None  # heads are joined by the common map

    def copy_projections(self) -> None:
        """Make the maps of global tokens, if any, copies of the others, as they start."""
        if self.global_projections is not None:
            self.global_projections.qkv.load_state_dict(self.projections.qkv.state_dict())

    def set_window(self, window: int) -> None:
        """Change the window, as from one phase of training to the next."""
        self.pattern = prepared(_pattern(window, **self._shape))
        # The rows of global tokens that have maps of their own are computed apart.
        self._without_rows = prepared(_pattern(window, **self._shape, rows=False))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.global_projections is None:
            return super().forward(x, context)
        q, k, v = self.projections.split(x, context)
        out, _ = attend(q, k, v, self._without_rows, documents=context.documents)
        count = self._shape["global_tokens"]
        q, k, v = self.global_projections.split(x, context)
        rows = F.scaled_dot_product_attention(
            q[:, :, :count], k, v, attn_mask=_same_document(context.documents, count)
        )
        return self.projections.join(torch.cat((rows.to(out.dtype), out[:, :, count:]), dim=2))


def _pattern(window, causal, dilation, heads, global_tokens, rows: bool = True) -> Pattern:
    """What is visible; without ``rows``, global tokens see no token after them but their window."""
    plain, dilated = heads
    if causal:
        near, gaps = patterns.window(window), patterns.dilated(window, dilation)
    else:
        if window < 2:
            raise ValueError(
                f"a bidirectional window reaches window // 2 to each side, so it must be at least "
                f"2, got {window}."
            )
        side = window // 2
        near, gaps = patterns.window(side, side), patterns.dilated(side, side, dilation)
    if dilation > 1 and dilated:
        near = patterns.per_head(*[near] * plain, *[gaps] * dilated)
    if global_tokens:
        leading = patterns.global_tokens(global_tokens)
        near = near | (leading if rows else patterns.causal() & leading)
    return patterns.causal() & near if causal else near


def _of_layer(name: str, numbers: int | Sequence[int], layer: int) -> int:
    if isinstance(numbers, int):
        return numbers
    if layer >= len(numbers):
        raise ValueError(
            f"{name} must be one number or have one for each layer, got {len(numbers)} for layer "
            f"{layer + 1}: {list(numbers)}."
        )
    return numbers[layer]


def _same_document(documents: Tensor | None, count: int) -> Tensor | None:
    """Which tokens the first ``count`` may see, ``(B, 1, count, L)``."""
    if documents is None:
        return None
    return (documents[:, :count, None] == documents[:, None, :])[:, None]
