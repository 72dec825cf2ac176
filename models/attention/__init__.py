"""The contract of an attention: what the backbone, generation, pictures and checks ask of it.

An attention is a module made with ``(dim, heads, layer, *, its own keywords)``: the Transformer
supplies the three, the yaml the rest. A new one is one file here and one yaml in ``conf/model``.
``models/README.md`` shows both kinds: with a pattern, and choosing keys by content.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from kernels.patterns import Pattern
from models.cache import LayerCache

Routing = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Context:
    """What the layers of one forward pass share, and what each of them keeps from pass to pass.

    Args:
        rotary: cosines and sines of the positions, two tensors ``(L, D / 2)``; None: no rotary
            positions.
        documents: number of each token's document ``(B, L)``, non-decreasing int32: a token sees
            none of another document; None: all tokens of a row are of one.
        positions: number of each token in its sequence ``(L,)`` int64; None: 0, 1, 2 ...
        cache: what this layer keeps; None: these tokens are the whole sequence.
        routing: what `Attention.route` gave for this layer and these tokens; None: not decided yet.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None
    cache: LayerCache | None = None
    routing: Routing | None = None


@dataclass(frozen=True)
class Chosen:
    """What an attention shows that chooses keys by content, where others have a pattern.

    Args:
        text: how keys are chosen, in one line, such as ``"the 8 best keys of the past"``.
        keys: mean number of keys that a query sees, over the queries of a sequence and the heads.
        cells: which keys each query of a given text sees, ``(heads, L, L)`` bool on the CPU; None
            where no text was given.
    """

    text: str
    keys: float
    cells: Tensor | None = field(default=None, compare=False)

    def keys_per_query(self, length: int, heads: int = 1) -> float:
        """See `Pattern.keys_per_query`."""
        return self.keys

    def on_layer(self, layer: int) -> "Chosen":
        """See `Pattern.on_layer`: no layer draws anything of its own."""
        return self

    def __repr__(self) -> str:
        return self.text


class Attention(nn.Module, ABC):
    """Maps ``x (B, L, dim)`` to ``(B, L, dim)``, every token seeing some of the tokens."""

    @abstractmethod
    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Attend ``x (B, L, dim)``, the normed residual stream.

        - ``context.routing``, if any, is used in place of a decision of its own.
        - ``context.cache``, if any, is filled with the tokens of the first pass, and afterwards
          takes one token a pass (`LayerCache`).
        """

    def route(self, x: Tensor, context: Context) -> Routing | None:
        """What `forward` decides by content, such as buckets or selected blocks: int tensors.

        Given back as ``context.routing``, it is used again and not decided again: a pass that is
        repeated to save memory must see the same keys. None: nothing is decided by content.
        """
        return None

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """Whether it is certain that no output depends on a later token."""

    @abstractmethod
    def cache(self, length: int) -> LayerCache:
        """What generation keeps of a sequence of ``length`` tokens: an empty cache.

        Raises:
            ValueError: if the attention sees later tokens.
        """

    @abstractmethod
    def flops_per_token(self, length: int) -> float:
        """Operations of one token's forward pass at this length, without the linear maps.

        Of what is really computed: scores, weighted sums, and the scoring that chooses keys.
        """

    @abstractmethod
    def visible(
        self, length: int, x: Tensor | None = None, context: Context | None = None
    ) -> Pattern | Chosen:
        """What queries see in a sequence of ``length`` tokens, for pictures and reports.

        A pattern where that is the same for every text. Otherwise a `Chosen`; with ``x (B, length,
        dim)`` and ``context``, as `forward` has them, its cells are those of the first row.
        """

    def losses(self) -> dict[str, Tensor]:
        """Terms that the last forward pass adds to the training loss, scalars by name."""
        return {}

    def check_model(self, layers: int, rotary: bool) -> None:
        """Refuse a model that the attention cannot be in.

        Args:
            layers: how many the model has.
            rotary: whether it has rotary positions.

        Raises:
            ValueError: if a setting does not suit them.
        """


MakeAttention = Callable[[int, int, int], Attention]  # from (dim, heads, layer)
