"""The one backbone: pre-norm blocks whose attention comes from the config, layer by layer."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.patterns import Pattern
from models.attention import Context
from models.embeddings import ImagePositions, rotary_tables
from models.heads import Head

DOCUMENTS = ("stream", "pack", "split")


class SwiGLU(nn.Module):
    """``W_out (silu(W_gate x) * W_up x)``, starting at zero (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_and_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)
        nn.init.normal_(self.gate_and_up.weight, std=dim**-0.5)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``; dropout on what is added."""

    def __init__(self, dim: int, hidden: int, attention: nn.Module, dropout: float):
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = attention
        self.feed_forward = SwiGLU(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), context))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """A decoder that predicts the next token, or an encoder that predicts masked ones.

    Args:
        vocab_size: number of tokens; the embedding has one more row, for the start id.
        dim: width of the residual stream.
        layers: number of blocks.
        heads: attention heads; ``dim // heads`` is the size of a head.
        attention: name -> constructor, called with ``(dim, heads, layer)``.
        layout: names of ``attention``, one a layer, repeated to the depth.
        hidden: width of the feed-forward layer; default ``8 / 3 dim``, rounded up to 64.
        dropout: probability, on the embedding and on what each sublayer adds.
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

    Raises:
        ValueError: if the head size is not whole and even, ``layout`` names no attention, or
            ``documents`` is none of the three.
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
        hidden: int | None = None,
        dropout: float = 0.0,
        tied_head: bool = False,
        rotary_base: float | None = 10_000.0,
        documents: str = "stream",
        masked: bool = False,
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__()
        _check(dim, layers, heads, dropout, attention, layout, documents)
        self.vocab_size, self.dim, self.layers, self.heads = vocab_size, dim, layers, heads
        self.rotary_base, self.documents, self.masked = rotary_base, documents, masked
        self.layout = [layout[n % len(layout)] for n in range(layers)]
        hidden = -(-8 * dim // (3 * 64)) * 64 if hidden is None else hidden
        self.embedding = nn.Embedding(vocab_size + 1 + masked, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, hidden, attention[name](dim, heads, layer), dropout)
            for layer, name in enumerate(self.layout)
        )
        self.head = Head(dim, vocab_size, self.embedding if tied_head else None)
        # A tied embedding is also the head, which wants logits of order one.
        std = dim**-0.5 if tied_head else 1.0
        nn.init.normal_(self.embedding.weight, std=std)
        # A stream has one start: its id is hardly ever trained, so it begins as "nothing known".
        nn.init.zeros_(self.embedding.weight[vocab_size])
        self.image_positions = None
        if image_shape is not None:
            self.image_positions = ImagePositions(dim, image_shape, std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids ``(B, L)`` -> logits of each next (or masked) token ``(B, L, vocab_size)``."""
        return self.head(self.hidden_states(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Nats summed over ``targets (B, L)``, and how many were scored; -1 is not scored."""
        return self.head.loss(self.hidden_states(tokens), targets)

    def nats(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each of ``targets (B, L)``, float32; 0 where it is -1."""
        return self.head.nats(self.hidden_states(tokens), targets)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Token ids ``(B, L)`` -> the residual stream after the last block ``(B, L, dim)``."""
        length, x = tokens.shape[1], self.embedding(tokens)
        if self.image_positions is not None:
            x = x + self.image_positions(length)
        x = self.dropout(x)
        context = Context(self._rotary_tables(length, tokens.device), self._documents(tokens))
        for block in self.blocks:
            x = block(x, context)
        return x

    def _rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if self.rotary_base is None:
            return None
        return rotary_tables(length, self.dim // self.heads, self.rotary_base, device)

    def _documents(self, tokens: Tensor) -> Tensor | None:
        starts = tokens == self.vocab_size
        # Rows without padding are the rule, and attention is faster without documents.
        if self.documents != "pack" and not (self.masked and starts.any()):
            return None
        return starts.cumsum(dim=1, dtype=torch.int32)

    def patterns(self) -> dict[str, Pattern]:
        """The pattern of each attention, by its name, at the first layer that has it."""
        patterns: dict[str, Pattern] = {}
        for name, block in zip(self.layout, self.blocks, strict=True):
            patterns.setdefault(name, block.attention.pattern)
        return patterns

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token, forward and backward, at this length.

        6 per weight of a matrix product (2 forward, 4 backward), and 12 ``dim`` per visible key in
        every layer (scores and weighted sum, 2 each forward, twice that backward); recomputation,
        embeddings, norms and softmax are not counted. Layers of one name count as its first layer.
        """
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        keys = {name: p.keys_per_query(length) for name, p in self.patterns().items()}
        attention = sum(12 * self.dim * keys[name] for name in self.layout)
        return 6 * (matrices + self.dim * self.vocab_size) + attention


def _check(dim, layers, heads, dropout, attention, layout, documents) -> None:
    if dim < 1 or layers < 1 or heads < 1 or not 0 <= dropout < 1:
        raise ValueError(
            f"a model needs dim, layers and heads of at least 1 and a dropout in [0, 1), got "
            f"model.dim={dim}, model.layers={layers}, model.heads={heads}, model.dropout={dropout}."
        )
    if dim % heads or dim // heads % 2:
        raise ValueError(
            f"dim must be an even multiple of heads (rotary positions turn pairs), got dim={dim} "
            f"and heads={heads}; change `model.dim` or `model.heads`."
        )
    unknown = [name for name in layout if name not in attention]
    if unknown or not layout:
        raise ValueError(
            f"layout must name attentions of {sorted(attention)}, got {list(layout)}; "
            f"change `model.layout`."
        )
    if documents not in DOCUMENTS:
        raise ValueError(
            f"model.documents must be one of {', '.join(DOCUMENTS)}, got {documents}; leave it to "
            f"`data.documents`."
        )
