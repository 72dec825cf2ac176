"""Attention over the keys that one declared pattern shows: what every static family is made of."""

from torch import Tensor, nn

from kernels.attend import attend
from kernels.patterns import Pattern, parse
from models.attention import Context
from models.attention.projections import MakeProjections, Projections
from models.cache.key_value import KeyValueCache


class PatternAttention(nn.Module):
    """Each query sees the keys that the pattern shows it, in one softmax.

    Args:
        pattern: terms of ``kernels.patterns`` or their text, which is all that a new attention
            needs: ``"causal() & (window(512) | global_tokens(16))"``. Every layer draws its own
            random blocks: layer ``n`` adds ``n`` to the ``layer`` of the term.
        projections: makes the linear maps, called with ``(dim, heads)``.

    Raises:
        ValueError: if the text is no pattern, or has one for a head that is not there.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int,
        *,
        pattern: str | Pattern,
        projections: MakeProjections = Projections,
    ):
        super().__init__()
        self.projections = projections(dim, heads)
        pattern = pattern if isinstance(pattern, Pattern) else parse(str(pattern))
        if pattern.variants > heads:
            raise ValueError(
                f"per_head must not have more patterns than heads={heads}, got "
                f"{pattern.variants}: {pattern!r}."
            )
        self.pattern = prepared(pattern.on_layer(layer))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.projections.split(x, context)
        if context.cache is None:
            out = self.attend(q, k, v, context)
        elif context.cache.tokens:
            out = context.cache.step(q, k, v)
        else:
            out = self.attend(q, k, v, context)
            context.cache.fill(k, v)
        return self.projections.join(out)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Queries, keys and values ``(B, H, L, D)`` -> ``(B, H, L, D)``."""
        out, _ = attend(q, k, v, self.pattern, documents=context.documents)
        return out

    def cache(self, length: int) -> KeyValueCache:
        """An empty cache for sequences of ``length`` tokens."""
        return KeyValueCache(self.pattern, self.projections.heads, length)

    def flops_per_token(self, length: int) -> float:
        """Forward operations of scores and weighted sums, mean over the tokens of a sequence."""
        keys = self.pattern.keys_per_query(length, self.projections.heads)
        return 2 * (self.projections.qk_dim + self.projections.dim) * keys


def prepared(pattern: Pattern) -> Pattern:
    """The pattern, which keeps what attention asks of it: its parts are not asked again."""
    _ = pattern.encoded, pattern.is_causal, pattern.past_seen_up_to, pattern.future_seen_up_to
    return pattern
