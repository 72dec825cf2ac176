"""The output head, and the loss it gives without holding all logits at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.embeddings import Embedding
from models.norms import make_norm

LOGITS_AT_ONCE = 2**25  # 128 MiB in float32: bytes need no chunks up to 131,072 tokens


class Head(nn.Module):
    """Logits of the next token. Starts at zero: an untrained model is exactly uniform.

    Args:
        dim: width of the model.
        embedding: of the tokens that can be predicted, ``vocab_size`` of them.
        norm: of the hidden states, ``"rms"`` or ``"layer"``.
        tied: the weight is the first ``vocab_size`` rows of the embedding.

    Raises:
        ValueError: if the norm is unknown.
    """

    def __init__(self, dim: int, embedding: Embedding, *, norm: str = "rms", tied: bool = False):
        super().__init__()
        self.vocab_size = embedding.vocab_size
        self.norm = make_norm(norm, dim)
        # The module and not its weight, so that memory which is given later is one and the same.
        self.embedding = embedding if tied else None
        if not tied:
            self.weight = nn.Parameter(torch.empty(self.vocab_size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial weights."""
        if self.embedding is None:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """``(..., dim)`` -> logits ``(..., vocab_size)``.

        With ``targets (N,)`` of ``x (N, dim)``, what `nats` says of them: the logits of so many
        tokens are held at once.
        """
        weight = self.weight if self.embedding is None else self.embedding.weight
        logits = F.linear(self.norm(x), weight[: self.vocab_size])
        if targets is None:
            return logits
        return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="none")

    def loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of ``targets``, in nats.

        Args:
            x: hidden states ``(B, L, dim)``.
            targets: ``(B, L)`` token ids; -1 is padding and not scored.

        Returns:
            The sum over the scored tokens (float64 scalar) and their number (int64 scalar).
        """
        return self.nats(x, targets).sum(dtype=torch.float64), (targets >= 0).sum()

    def nats(self, x: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each of ``targets (B, L)``, float32; 0 where it is -1."""
        flat_x, flat_targets = x.flatten(0, 1), targets.flatten()
        tokens = max(LOGITS_AT_ONCE // self.vocab_size, 1)
        if len(flat_x) <= tokens:
            return self(flat_x, flat_targets).view_as(targets)
        chunks = zip(flat_x.split(tokens), flat_targets.split(tokens), strict=True)
        parts = [checkpoint(self, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(parts).view_as(targets)
