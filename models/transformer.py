"""The one backbone: embedding, stack of blocks, head. Attention comes from the yaml, by layer."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kernels.common.documents import first_tokens
from models.attention import Attention, Context, MakeAttention
from models.cache import Cache
from models.embeddings import Embedding, rotary_tables
from models.heads import Head
from models.initialisation import reset_modules
from models.stack import Block, make_stack


class Transformer(nn.Module):
    """Blocks over a sequence of tokens; whether it is a decoder is up to its attentions.

    The weights are drawn after construction, by `initialise`. Under ``torch.device("meta")`` a
    model has none; it can be sharded, given memory (``to_empty``) and then initialised.

    Args:
        dim: width of the residual stream.
        layers: number of blocks.
        heads: attention heads; ``dim // heads`` is the size of a head.
        attention: name -> constructor, called with ``(dim, heads, layer)``.
        layout: names of ``attention``, one a layer, repeated to the depth.
        embedding: constructor, called with ``dim``.
        block: constructor, called with ``(attention, dim)``.
        head: constructor, called with ``(dim, embedding)``.
        stack: how blocks keep activations, a name of `models.stack.STACKS`.
        rotary_base: longest wavelength of the rotary positions over 2 pi, in tokens; None: no
            rotary positions.
        initialise: draws the weights of the finished model; None: each module draws its own, which
            make a new block the identity.

    Raises:
        ValueError: if a size, a name or a combination of them cannot be.
    """

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        heads: int,
        attention: Mapping[str, MakeAttention],
        layout: Sequence[str],
        embedding: Callable[[int], Embedding],
        block: Callable[[Attention, int], Block] = Block,
        head: Callable[[int, Embedding], Head] = Head,
        stack: str = "plain",
        rotary_base: float | None = 10_000.0,
        initialise: Callable[[nn.Module], None] | None = None,
    ):
        super().__init__()
        _check_sizes(dim, layers, heads, rotary_base)
        _check_layout(layout, attention)
        self.dim, self.layers, self.heads, self.rotary_base = dim, layers, heads, rotary_base
        self.layout = [layout[n % len(layout)] for n in range(layers)]
        self.initial_weights = initialise
        device = torch.get_default_device()
        with torch.device("meta"):  # the weights do not depend on what constructors draw
            self.embedding = embedding(dim)
            attentions = [
                self._make_attention(name, attention[name], layer)
                for layer, name in enumerate(self.layout)
            ]
            self.blocks = make_stack(stack, [block(made, dim) for made in attentions])
            self.head = head(dim, self.embedding)
        self._check_global_vectors()
        if device.type != "meta":
            self.to_empty(device=device)
            self.initialise()

    @property
    def vocab_size(self) -> int:
        """Number of tokens that can be predicted; also the start id."""
        return self.embedding.vocab_size

    def initialise(self) -> None:
        """Draw all weights, in place, whether they are whole or sharded."""
        reset_modules(self)
        # A tied embedding is also the head, which wants logits of order one.
        self.embedding.draw(1.0 if self.head.embedding is None else self.dim**-0.5)
        self.embedding.clear_start()
        if self.initial_weights is not None:
            self.initial_weights(self)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits of each next (or masked) token, ``(B, L, vocab_size)``.

        Args:
            tokens: ids ``(B, L)``.
            documents: number of each token's document ``(B, L)``, int32, non-decreasing: a token
                sees none of another document; None: all tokens of a row are of one.
        """
        return self.head(self.hidden_states(tokens, documents))

    def loss(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Nats summed over ``targets (B, L)``, and how many were scored; -1 is not scored."""
        return self.head.loss(self.hidden_states(tokens, documents), targets)

    def nats(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each of ``targets (B, L)``, float32; 0 where it is -1."""
        return self.head.nats(self.hidden_states(tokens, documents), targets)

    def losses(self) -> dict[str, Tensor]:
        """Terms that attentions add to the loss of the last pass, summed over the layers."""
        found: dict[str, Tensor] = {}
        for _, attention in self.attentions():
            for name, loss in attention.losses().items():
                found[name] = found[name] + loss if name in found else loss
        return found

    def check_length(self, length: int) -> None:
        """Refuse sequences that the model has no positions for.

        Raises:
            ValueError: if ``length`` is more than its learned positions reach.
        """
        self.embedding.check_length(length)

    def cache(self, length: int) -> Cache:
        """An empty cache for sequences of ``length`` tokens.

        Raises:
            ValueError: if the model has no positions for so many, or sees later tokens.
        """
        self.check_length(length)
        return Cache([attention.cache(length) for _, attention in self.attentions()])

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: Cache, documents: Tensor | None = None) -> Tensor:
        """Logits of the token after these, ``(B, L)`` -> ``(B, vocab_size)``; the cache takes them.

        The first call takes as many as there are, and each later one, after ``cache.advance()``, a
        single token of the same document.

        Args:
            tokens: ids ``(B, L)``.
            cache: of this model.
            documents: see `forward`; of several, the last alone is read, and kept.

        Raises:
            ValueError: if the last documents of the rows begin at different tokens.
        """
        if documents is not None:
            tokens = tokens[:, _start_of_last(documents) :]
        return self.head(self.hidden_states(tokens, cache=cache)[:, -1])

    def hidden_states(
        self, tokens: Tensor, documents: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Token ids ``(B, L)`` -> the residual stream after the last block ``(B, L, dim)``.

        With a cache, all tokens must be of one document.
        """
        first = 0 if cache is None else cache.position  # where in the sequence these tokens begin
        x = self.embedding(tokens, first, documents)
        x = self.blocks(x, self._context(x, first, documents), cache)
        if cache is not None and not cache.started:
            cache.start(x.shape[1], x.device)
        return x[:, self.embedding.num_global :]

    def attentions(self) -> list[tuple[str, Attention]]:
        """Name and attention of each layer, from the first up."""
        found = [block.attention for block in self.blocks]
        return list(zip(self.layout, found, strict=True))

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token, forward and backward, at this length.

        6 per weight of a matrix product (2 forward, 4 backward), and three times what the
        attentions count for the forward pass; recomputation, embeddings, norms and softmax are not
        counted.
        """
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        rows = length + self.embedding.num_global
        attention = sum(made.flops_per_token(rows) for _, made in self.attentions())
        blocks = (6 * matrices + 3 * attention) * rows / length  # of vectors in front, too
        return blocks + 6 * self.dim * self.vocab_size

    def _context(self, x: Tensor, first: int | Tensor, documents: Tensor | None) -> Context:
        """What all layers share, of ``x (B, num_global + L, dim)``."""
        positions = first + torch.arange(x.shape[1], device=x.device)
        rotary = None
        if self.rotary_base is not None:
            rotary = rotary_tables(positions, self.dim // self.heads, self.rotary_base)
        vectors = self.embedding.num_global
        if documents is not None and vectors:  # of the first document: others are padding
            documents = torch.cat((documents[:, :1].expand(-1, vectors), documents), dim=1)
        return Context(rotary=rotary, documents=documents, positions=positions)

    def _make_attention(self, name: str, make: MakeAttention, layer: int) -> Attention:
        try:
            attention = make(self.dim, self.heads, layer)
            attention.check_model(self.layers, self.rotary_base is not None)
        except ValueError as error:  # an attention does not know by which name it is configured
            raise ValueError(f"model.attention.{name}: {error}") from error
        return attention

    def _check_global_vectors(self) -> None:
        if self.embedding.num_global and any(made.is_causal for _, made in self.attentions()):
            raise ValueError(
                "global vectors in front of the tokens are for attentions that see later tokens; "
                "set model.embedding.global_vectors=0, or causal=false of the attention."
            )


def _start_of_last(documents: Tensor) -> int:
    """The first token of the last document of all rows."""
    starts = first_tokens(documents)[:, -1].unique().tolist()
    if len(starts) > 1:
        raise ValueError(
            f"a cache counts the tokens of all rows alike, so that their last documents must begin "
            f"at the same token, got {starts}; give each such row a cache of its own."
        )
    return starts[0]


def _check_sizes(dim: int, layers: int, heads: int, rotary_base: float | None) -> None:
    if min(dim, layers, heads) < 1:
        raise ValueError(
            f"a model needs dim, layers and heads of at least 1, got model.dim={dim}, "
            f"model.layers={layers} and model.heads={heads}."
        )
    if dim % heads or dim // heads % 2:
        raise ValueError(
            f"dim must be an even multiple of heads (rotary positions turn pairs), got dim={dim} "
            f"and heads={heads}; change `model.dim` or `model.heads`."
        )
    if rotary_base is not None and not 0 < rotary_base < math.inf:
        raise ValueError(
            f"model.rotary_base must be positive, got {rotary_base}; null is for no rotary "
            f"positions."
        )


def _check_layout(layout: Sequence[str], attention: Mapping[str, MakeAttention]) -> None:
    known = sorted(name for name, make in attention.items() if callable(make))
    if not layout or any(name not in known for name in layout):
        raise ValueError(
            f"layout must name attentions of {known}, got {list(layout)}; change `model.layout`."
        )
