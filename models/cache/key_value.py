"""The keys and values that decoding keeps: those that the pattern can still reach."""

import torch
from torch import Tensor

from kernels.patterns import Pattern
from kernels.patterns.retention import cache_plan
from models.cache import LayerCache


class KeyValueCache(LayerCache):
    """Keys and values of a layer with a pattern. A window, say, is a ring of as many slots.

    Args:
        pattern: which keys are visible, causal.
        heads: attention heads.
        length: tokens of the sequence, in all.

    Raises:
        ValueError: if the pattern is not causal.
    """

    def __init__(self, pattern: Pattern, heads: int, length: int):
        self.plan = cache_plan(pattern, heads, length)

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Take keys ``(B, H, L, D)`` and values ``(B, H, L, Dv)`` of the first ``L`` tokens."""
        B, heads, self.tokens, D = k.shape
        slots = int(self.plan.kept.max())
        # Under autocast only the values are sure to be in the dtype that attention computes in.
        self.keys = v.new_zeros(B, heads, slots, D)
        self.values = v.new_zeros(B, heads, slots, v.shape[3])
        head, key = self.plan.held(self.tokens)
        slot = self.plan.slot[head, key]
        self.keys[:, head, slot] = k[:, head, key].to(v.dtype)
        self.values[:, head, slot] = v[:, head, key]
        self.heads = torch.arange(heads, device=v.device)
        self.slot = torch.zeros_like(self.heads)  # of the next key
        self.seen = v.new_zeros(heads, slots, dtype=torch.bool)  # slots, by the next query
        self.steps = self.plan.steps(self.tokens, v.device)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take the next key ``(B, H, 1, D)`` and value, and attend with the query that they have.

        Returns:
            ``(B, H, 1, Dv)`` in the dtype of ``v``; 0 where the query sees no key.
        """
        assert q.shape[2] == 1, "after the first tokens, one at a time"
        self.keys[:, self.heads, self.slot] = k[:, :, 0].to(v.dtype)
        self.values[:, self.heads, self.slot] = v[:, :, 0]
        with torch.autocast(v.device.type, enabled=False):  # scores and sums in float32
            score = q.to(v.dtype).float() @ self.keys.float().mT * q.shape[3] ** -0.5
            hidden = ~self.seen[:, None]  # (H, 1, slots)
            weight = score.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            return (weight.masked_fill(hidden, 0) @ self.values.float()).to(v.dtype)

    def advance(self) -> list[tuple[Tensor, Tensor]]:
        slot, seen = next(self.steps)
        return [(self.slot, slot), (self.seen, seen)]
