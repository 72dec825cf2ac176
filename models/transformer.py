"""The one backbone: pre-norm blocks whose attention comes from the config, layer by layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.patterns import Pattern
from models.attention import Context
from models.cache.key_value import Cache
from models.embeddings import RasterPositions, rotary_tables
from models.feed_forward import SwiGLU
from models.heads import Head

DOCUMENTS = ("stream", "pack", "split")
NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``; dropout on what is added.

    This is the residual form of the Sparse Transformer too (Child et al. 2019, section 5.2). With
    ``recompute`` it keeps nothing but ``x`` for the backward pass and runs again there.
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        norm: Callable[[], nn.Module],
        dropout: float,
        recompute: bool = False,
    ):
        super().__init__()
        self.recompute = recompute
        self.attention_norm, self.feed_forward_norm = norm(), norm()
        self.attention = attention
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        # In here, so that a compiled block is one graph each way, and not called again.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._sublayers, x, context, use_reentrant=False)
        return self._sublayers(x, context)

    def _sublayers(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), context))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """Blocks over a sequence of tokens; whether it is a decoder is up to its attentions.

    Args:
        vocab_size: number of tokens; the embedding has one more row, for the start id.
        dim: width of the residual stream.
        layers: number of blocks.
        heads: attention heads; ``dim // heads`` is the size of a head.
        attention: name -> constructor, called with ``(dim, heads, layer)``.
        layout: names of ``attention``, one a layer, repeated to the depth.
        feed_forward: constructor, called with ``(dim, hidden)``.
        hidden: width of the feed-forward layer; None: what ``feed_forward`` has by default.
        norm: ``"rms"`` or ``"layer"``.
        dropout: probability, on the embedding and on what each sublayer adds.
        embedding_dropout: another one on the embedding; None: ``dropout``.
        tied_head: the output head uses the token embedding.
        rotary_base: longest wavelength of the rotary positions over 2 pi, in tokens; None: no
            rotary positions.
        documents: ``"pack"``: each start id among the tokens begins a document, which sees none
            of the others; ``"stream"`` or ``"split"``: all tokens of a row are of one document.
        masked: the model predicts masked tokens: the embedding has a row for the mask id, which is
            ``vocab_size + 1``, and a start id among the tokens always begins a document, because
            padding is one, and would be seen by the tokens before it.
        image_shape: rows, columns and channels of the images that the tokens are: adds a learned
            embedding of each, so sequences must begin where an image does; None: no images.
        matrix_shape: rows and columns: adds a learned embedding of each, as if the text were
            written into a matrix; None: no such positions.
        global_vectors: learned vectors in front of the tokens, which are no text and not scored
            (the extra tokens of BigBird-ETC); needs attentions that see later tokens too.
        initialise: draws the initial weights of the finished model; None: each layer's own, which
            make a new block the identity.
        recompute: blocks keep nothing but their input for the backward pass and run again there.

    Raises:
        ValueError: if a size, a name or a combination of them cannot be.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        layers: int,
        heads: int,
        attention: Mapping[str, Callable[[int, int, int], nn.Module]],
        layout: Sequence[str],
        feed_forward: Callable[[int, int | None], nn.Module] = SwiGLU,
        hidden: int | None = None,
        norm: str = "rms",
        dropout: float = 0.0,
        embedding_dropout: float | None = None,
        tied_head: bool = False,
        rotary_base: float | None = 10_000.0,
        documents: str = "stream",
        masked: bool = False,
        image_shape: Sequence[int] | None = None,
        matrix_shape: Sequence[int] | None = None,
        global_vectors: int = 0,
        initialise: Callable[[nn.Module], None] | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        _check_sizes(dim, layers, heads, dropout, global_vectors)
        _check_options(hidden, embedding_dropout, rotary_base)
        _check_names(attention, layout, documents, norm)
        self.vocab_size, self.dim, self.layers, self.heads = vocab_size, dim, layers, heads
        self.rotary_base, self.documents, self.masked = rotary_base, documents, masked
        self.layout = [layout[n % len(layout)] for n in range(layers)]
        self.embedding = nn.Embedding(vocab_size + 1 + masked, dim)
        self.dropout = nn.Dropout(dropout if embedding_dropout is None else embedding_dropout)
        self.blocks = nn.ModuleList(
            Block(
                _attention(name, attention[name], dim, heads, layer),
                feed_forward(dim, hidden),
                lambda: NORMS[norm](dim),
                dropout,
                recompute,
            )
            for layer, name in enumerate(self.layout)
        )
        self.head = Head(NORMS[norm](dim), vocab_size, self.embedding if tied_head else None)
        # A tied embedding is also the head, which wants logits of order one.
        std = dim**-0.5 if tied_head else 1.0
        nn.init.normal_(self.embedding.weight, std=std)
        # A stream has one start: its id is hardly ever trained, so it begins as "nothing known".
        nn.init.zeros_(self.embedding.weight[vocab_size])
        shapes = [shape for shape in (image_shape, matrix_shape) if shape is not None]
        self.positions = nn.ModuleList(RasterPositions(dim, shape, std) for shape in shapes)
        self.global_vectors = None
        if global_vectors:
            self.global_vectors = nn.Embedding(global_vectors, dim)
            nn.init.normal_(self.global_vectors.weight, std=std)
        _check_combination(self)
        if initialise is not None:
            initialise(self)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Token ids ``(B, L)`` -> logits of each next (or masked) token ``(B, L, vocab_size)``."""
        return self.head(self.hidden_states(tokens, documents))

    def loss(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Nats summed over ``targets (B, L)``, and how many were scored; -1 is not scored."""
        return self.head.loss(self.hidden_states(tokens, documents), targets)

    def nats(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each of ``targets (B, L)``, float32; 0 where it is -1."""
        return self.head.nats(self.hidden_states(tokens, documents), targets)

    def check_length(self, length: int) -> None:
        """Refuse sequences that the model has no positions for.

        Raises:
            ValueError: if ``length`` is more than its learned positions reach.
        """
        for positions in self.positions:
            positions(length)

    def cache(self, length: int) -> Cache:
        """An empty cache for sequences of ``length`` tokens.

        Raises:
            ValueError: if the model has no positions for so many, or sees later tokens.
        """
        self.check_length(length)
        return Cache([block.attention.cache(length) for block in self.blocks])

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits of the token after these, ``(B, L)`` -> ``(B, vocab_size)``; the cache takes them.

        The first call takes as many as there are, and each later one, after ``cache.advance()``, a
        single token.
        """
        return self.head(self.hidden_states(tokens, cache=cache)[:, -1])

    def hidden_states(
        self, tokens: Tensor, documents: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Token ids ``(B, L)`` -> the residual stream after the last block ``(B, L, dim)``."""
        length, x = tokens.shape[1], self.embedding(tokens)
        first = cache.position if cache else 0  # where in the sequence these tokens begin
        for positions in self.positions:
            x = x + positions(length, first)
        extra = self._extra
        if extra:
            vectors = self.global_vectors.weight.to(x.dtype)
            x = torch.cat((vectors.expand(len(x), -1, -1), x), dim=1)
        x = self.dropout(x)
        rotary = self._rotary_tables(extra + length, tokens.device, first)
        if documents is not None:
            documents = F.pad(documents, (extra, 0))  # of the first document: others are padding
        context = Context(rotary, documents)
        for n, block in enumerate(self.blocks):
            context = replace(context, cache=cache.layers[n]) if cache else context
            x = block(x, context)
        return x[:, extra:]

    @property
    def _extra(self) -> int:
        """Global vectors in front of the tokens."""
        return 0 if self.global_vectors is None else self.global_vectors.num_embeddings

    def _rotary_tables(
        self, length: int, device: torch.device, first: int | Tensor
    ) -> tuple[Tensor, Tensor] | None:
        if self.rotary_base is None:
            return None
        return rotary_tables(length, self.dim // self.heads, self.rotary_base, device, first)

    def set_windows(self, windows: Sequence[int]) -> None:
        """Give each layer a window of its own, as Longformer's staged training does.

        Raises:
            ValueError: unless there is one for each layer, and each has an attention with a window.
        """
        if len(windows) != self.layers:
            raise ValueError(
                f"windows must have one entry for each of the {self.layers} layers, got "
                f"{len(windows)}: {list(windows)}."
            )
        for block, name, window in zip(self.blocks, self.layout, windows, strict=True):
            if not hasattr(block.attention, "set_window"):
                raise ValueError(
                    f"windows are for attentions that have one, such as model=longformer; {name} "
                    f"has none."
                )
            block.attention.set_window(window)

    def patterns(self) -> dict[str, Pattern]:
        """The different patterns of each attention, by its name, from the first layer up.

        Layers that differ in the draw of their random blocks alone count as one.
        """
        patterns: dict[str, Pattern] = {}
        known = set()
        for layer, (name, block) in enumerate(zip(self.layout, self.blocks, strict=True)):
            pattern = block.attention.pattern
            if (name, pattern.on_layer(-layer)) not in known:
                known.add((name, pattern.on_layer(-layer)))
                label = f"{name}, layer {layer + 1}" if name in patterns else name
                patterns[label] = pattern
        return patterns

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token, forward and backward, at this length.

        6 per weight of a matrix product (2 forward, 4 backward), and 6 times the widths of keys and
        values per visible key in every layer (scores and weighted sum, 2 each forward, twice that
        backward); recomputation, embeddings, norms and softmax are not counted.
        """
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        rows = length + self._extra
        attention = sum(block.attention.flops_per_token(rows) for block in self.blocks)
        blocks = (6 * matrices + 3 * attention) * rows / length  # of vectors in front, too
        return blocks + 6 * self.dim * self.vocab_size


def _attention(name: str, make: Callable[[int, int, int], nn.Module], *arguments) -> nn.Module:
    try:
        return make(*arguments)
    except ValueError as error:  # an attention does not know by which name it is configured
        raise ValueError(f"model.attention.{name}: {error}") from error


def _check_sizes(dim, layers, heads, dropout, global_vectors) -> None:
    if dim < 1 or layers < 1 or heads < 1 or not 0 <= dropout < 1 or global_vectors < 0:
        raise ValueError(
            f"a model needs dim, layers and heads of at least 1, a dropout in [0, 1) and no less "
            f"than 0 global vectors, got model.dim={dim}, model.layers={layers}, "
            f"model.heads={heads}, model.dropout={dropout}, model.global_vectors={global_vectors}."
        )
    if dim % heads or dim // heads % 2:
        raise ValueError(
            f"dim must be an even multiple of heads (rotary positions turn pairs), got dim={dim} "
            f"and heads={heads}; change `model.dim` or `model.heads`."
        )


def _check_options(hidden, embedding_dropout, rotary_base) -> None:
    if hidden is not None and hidden < 1:
        raise ValueError(f"model.hidden must be at least 1 or null, got {hidden}.")
    if embedding_dropout is not None and not 0 <= embedding_dropout < 1:
        raise ValueError(f"model.embedding_dropout must be in [0, 1), got {embedding_dropout}.")
    if rotary_base is not None and not 0 < rotary_base < math.inf:
        raise ValueError(
            f"model.rotary_base must be positive, got {rotary_base}; null is for no rotary "
            f"positions."
        )


def _check_names(attention, layout, documents, norm) -> None:
    known = sorted(name for name, make in attention.items() if callable(make))
    unknown = [name for name in layout if name not in known]
    if unknown or not layout:
        raise ValueError(
            f"layout must name attentions of {known}, got {list(layout)}; change `model.layout`."
        )
    if documents not in DOCUMENTS:
        raise ValueError(
            f"model.documents must be one of {', '.join(DOCUMENTS)}, got {documents}; leave it to "
            f"`data.documents`."
        )
    if norm not in NORMS:
        raise ValueError(f"model.norm must be one of {', '.join(NORMS)}, got {norm}.")


def _check_combination(model: Transformer) -> None:
    attentions = [block.attention for block in model.blocks]
    for name, attention in zip(model.layout, attentions, strict=True):
        for key, count in getattr(attention, "listed", {}).items():
            if count > model.layers:
                raise ValueError(
                    f"model.attention.{name}.{key} must be one number or have one for each of the "
                    f"{model.layers} layers, got {count}."
                )
    narrow = [a.projections.qk_dim for a in attentions if a.projections.qk_dim != model.dim]
    if model.rotary_base is not None and narrow:
        raise ValueError(
            f"rotary positions need queries as wide as the model ({model.dim}), got "
            f"qk_dim={narrow[0]}; set model.rotary_base=null."
        )
    if model.global_vectors is None:
        return
    if model.documents == "pack":
        raise ValueError(
            "global vectors see all tokens, and data.documents=pack keeps documents apart; set "
            "model.global_vectors=0 or data.documents=split."
        )
    if any(attention.pattern.is_causal for attention in attentions):
        raise ValueError(
            "global vectors in front of the tokens are for attentions that see later tokens; set "
            "model.global_vectors=0, or causal=false of the attention."
        )
