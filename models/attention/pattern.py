"""Attention over the keys that one declared pattern shows: what every static family is made of."""

from torch import Tensor

from kernels.attend import attend
from kernels.patterns import Pattern, parse
from models.attention import Attention, Context
from models.attention.projections import MakeProjections, Projections
from models.cache.key_value import KeyValueCache

COMPUTES = ("forward", "attend", "route")
DESCRIBES = ("is_causal", "cache", "flops_per_token", "visible")


class PatternAttention(Attention):
    """Each query sees the keys that the pattern shows it, in one softmax.

    A subclass that computes in another way (`forward`, `attend` or `route` of its own) must also
    say what it keeps, costs and shows (`is_causal`, `cache`, `flops_per_token`, `visible`). Those
    of this class are of the pattern: with another rule, generation would see other keys than
    training did.

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

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        computed = min((_depth(cls, name), name) for name in COMPUTES)
        missing = [name for name in DESCRIBES if _depth(cls, name) > computed[0]]
        if missing:
            raise TypeError(
                f"{cls.__name__} has a `{computed[1]}` of its own and would keep, count and show "
                f"what the pattern does; give it {', '.join(missing)} too (`cache = "
                f"PatternAttention.cache` where the pattern's is right), or derive from Attention."
            )

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

    @property
    def is_causal(self) -> bool:
        return self.pattern.is_causal

    def cache(self, length: int) -> KeyValueCache:
        return KeyValueCache(self.pattern, self.projections.heads, length)

    def flops_per_token(self, length: int) -> float:
        keys = self.pattern.keys_per_query(length, self.projections.heads)
        return 2 * (self.projections.qk_dim + self.projections.dim) * keys

    def visible(
        self, length: int, x: Tensor | None = None, context: Context | None = None
    ) -> Pattern:
        return self.pattern

    def check_model(self, layers: int, rotary: bool) -> None:
        self.projections.check_model(rotary)


def prepared(pattern: Pattern) -> Pattern:
    """The pattern, which keeps what attention asks of it: its parts are not asked again."""
    _ = pattern.encoded, pattern.is_causal, pattern.past_seen_up_to, pattern.future_seen_up_to
    return pattern


def _depth(cls: type, name: str) -> int:
    """How many classes up a member is defined; 0: in this one."""
    return next(n for n, parent in enumerate(cls.__mro__) if name in vars(parent))
