"""Longformer (Beltagy et al. 2020, arXiv:2004.05150): sliding windows and global tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import patterns
from kernels.attend import attend
from kernels.common.documents import first_tokens
from kernels.patterns import Pattern
from models.attention import Context
from models.attention.pattern import PatternAttention, prepared
from models.attention.projections import MakeProjections, Projections


class LongformerAttention(PatternAttention):
    """Each token sees a window, which may differ by layer and have gaps in some heads.

    The causal form is that of the paper's character models (section 4): a token and the
    ``window - 1`` before it. Bidirectional (``causal=False``, section 5) the window reaches
    ``window // 2`` to each side; ``attention_window`` of the released code counts one side.

    The leading ``global_tokens`` of a document are seen by every later token of it. Bidirectional
    they also see every token, through queries, keys and values of their own (section 3.1) that
    start as copies of the others; other tokens see them by the common maps, in one softmax with the
    window.

    Args:
        causal: later tokens are hidden.
        window: keys of a window; one number, or one for each layer.
        dilation: distance of neighbouring keys in the dilated heads; one number, or one for each
            layer; 1 is no gap.
        dilated_heads: so many heads are dilated, the last ones.
        global_tokens: leading tokens of a document that are global.
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
        own_window = _of_layer("window", window, layer)
        shape = {
            "causal": causal,
            "dilation": _of_layer("dilation", dilation, layer),
            "heads": (heads - dilated_heads, dilated_heads),
            "global_tokens": global_tokens,
        }
        pattern = _pattern(own_window, **shape)
        super().__init__(dim, heads, layer, pattern=pattern, projections=projections)
        self.lists = {
            name: list(numbers)
            for name, numbers in (("window", window), ("dilation", dilation))
            if not isinstance(numbers, int)
        }
        self.global_tokens = global_tokens
        # The rows of global tokens that have maps of their own are computed apart.
        self.pattern_without_rows = prepared(_pattern(own_window, **shape, rows=False))
        self.global_projections = None
        if global_tokens and global_projections and not causal:
            self.rows = prepared(patterns.leading_queries(global_tokens))
            self.global_projections = projections(dim, heads)
            self.global_projections.out = None  # heads are joined by the common map
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the maps of global tokens, if any, copies of the others, as they start."""
        if self.global_projections is not None:
            own, common = self.global_projections, self.projections
            with torch.no_grad():
                for name, parameter in own.named_parameters():
                    parameter.copy_(common.get_parameter(name))

    def check_model(self, layers: int, rotary: bool) -> None:
        super().check_model(layers, rotary)
        for name, numbers in self.lists.items():
            if len(numbers) > layers:
                raise ValueError(
                    f"{name} must be one number or have one for each of the {layers} layers, got "
                    f"{len(numbers)}: {numbers}."
                )

    # Maps of their own change what global tokens compute, and not which keys are seen; a causal
    # layer, which alone can be cached, has none.
    is_causal = PatternAttention.is_causal
    cache = PatternAttention.cache
    flops_per_token = PatternAttention.flops_per_token
    visible = PatternAttention.visible

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.global_projections is None:
            return super().forward(x, context)
        q, k, v = self.projections.split(x, context)
        out, _ = attend(q, k, v, self.pattern_without_rows, documents=context.documents)
        count = self.global_tokens
        q, k, v = self.global_projections.split(x, context)
        if context.documents is None:
            rows = F.scaled_dot_product_attention(q[:, :, :count], k, v)
            out = torch.cat((rows.to(out.dtype), out[:, :, count:]), dim=2)
        else:
            rows, _ = attend(q, k, v, self.rows, documents=context.documents)
            number = torch.arange(x.shape[1], device=x.device) - first_tokens(context.documents)
            out = torch.where((number < count)[:, None, :, None], rows, out)
        return self.projections.join(out)


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
