"""An attention without a pattern, in plain torch: what the contract must be enough for."""

import torch
from torch import Tensor

from models.attention import Attention, Chosen, Context
from models.attention.projections import Projections
from models.cache import LayerCache


class TopKAttention(Attention):
    """Each query sees the ``keys`` earlier tokens, itself counted, that have the highest scores."""

    def __init__(self, dim: int, heads: int, layer: int, *, keys: int):
        super().__init__()
        self.keys, self.decisions = keys, 0
        self.projections = Projections(dim, heads)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.projections.split(x, context)
        cache = context.cache
        if cache is not None and cache.tokens:
            return self.projections.join(cache.step(q, k, v, context.positions))
        chosen = self.choose(q, k, context) if context.routing is None else context.routing
        if cache is not None:
            cache.fill(k, v)
        return self.projections.join(attend_chosen(q, k, v, chosen))

    def route(self, x: Tensor, context: Context) -> Tensor:
        q, k, _ = self.projections.split(x, context)
        return self.choose(q, k, context)

    def choose(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Numbers of the keys of each query ``(B, H, L, keys)``, -1 for none."""
        self.decisions += 1
        position = torch.arange(q.shape[2], device=q.device)
        hidden = position[:, None] < position
        if context.documents is not None:
            documents = context.documents[:, None]
            hidden = hidden | (documents[..., None] != documents[..., None, :])
        return choose_keys(q, k, hidden, self.keys)

    @property
    def is_causal(self) -> bool:
        return True

    def cache(self, length: int) -> "TopKCache":
        return TopKCache(self.keys, length)

    def flops_per_token(self, length: int) -> float:
        scoring = 2 * self.projections.qk_dim * (length + 1) / 2
        return scoring + 2 * 2 * self.projections.dim * self.mean_keys(length)

    def visible(
        self, length: int, x: Tensor | None = None, context: Context | None = None
    ) -> Chosen:
        text = f"the {self.keys} best keys of the past"
        if x is None:
            return Chosen(text, self.mean_keys(length))
        chosen = self.route(x, context)[0].cpu()
        cells = torch.zeros(*chosen.shape[:2], length + 1, dtype=torch.bool)
        cells.scatter_(2, chosen.where(chosen >= 0, length), True)
        return Chosen(text, self.mean_keys(length), cells[:, :, :length])

    def mean_keys(self, length: int) -> float:
        return sum(min(n, self.keys) for n in range(1, length + 1)) / length


class TopKCache(LayerCache):
    """All keys and values: any of them may be chosen."""

    def __init__(self, count: int, length: int):
        self.count, self.length = count, length

    def fill(self, k: Tensor, v: Tensor) -> None:
        self.tokens = k.shape[2]
        self.keys, self.values = (
            x.new_zeros(*x.shape[:2], self.length, x.shape[3]) for x in (k, v)
        )
        self.keys[:, :, : self.tokens], self.values[:, :, : self.tokens] = k, v

    def step(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        hidden = positions < torch.arange(self.length, device=q.device)
        chosen = choose_keys(q, self.keys, hidden, self.count)
        return attend_chosen(q, self.keys, self.values, chosen)


def choose_keys(q: Tensor, k: Tensor, hidden: Tensor, count: int) -> Tensor:
    scores = (q @ k.mT).masked_fill(hidden, float("-inf"))
    best = scores.topk(min(count, k.shape[2]), dim=-1)
    return best.indices.where(best.values > float("-inf"), -1)


def attend_chosen(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    """Attention of each query to its own keys: ``(B, H, L, D)``."""
    index = chosen.clamp(min=0).flatten(2)[..., None]  # (B, H, L * keys, 1)
    k, v = (
        x.gather(2, index.expand(-1, -1, -1, x.shape[3])).unflatten(2, chosen.shape[2:])
        for x in (k, v)
    )
    scores = (q[:, :, :, None] * k).sum(dim=-1) * q.shape[3] ** -0.5
    weight = scores.masked_fill(chosen < 0, float("-inf")).softmax(dim=-1)
    return (weight[..., None] * v).sum(dim=3)
