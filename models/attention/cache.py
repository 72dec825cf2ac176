"""The keys and values that decoding keeps: those that the pattern can still reach."""

import torch
from torch import Tensor

from kernels.patterns import Pattern
from kernels.reach import cache_plan


class KeyValueCache:
    """Keys and values of one layer: takes the first tokens at once, then one after the other.

    Args:
        pattern: which keys are visible, causal.
        heads: attention heads.
        length: tokens of the sequence, in all.

    Raises:
        ValueError: if the pattern is not causal.
    """

    def __init__(self, pattern: Pattern, heads: int, length: int):
        self.plan = cache_plan(pattern, heads, length)
        self.tokens = 0  # taken so far

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
        self.steps = self.plan.steps(self.tokens, v.device)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take the next key ``(B, H, 1, D)`` and value, and attend with the query that they have.

        Returns:
            ``(B, H, 1, Dv)`` in the dtype of ``v``; 0 where the query sees no key.
        """
        assert q.shape[2] == 1, "after the first tokens, one at a time"
        slot, seen = next(self.steps)
        self.keys[:, self.heads, slot] = k[:, :, 0].to(v.dtype)
        self.values[:, self.heads, slot] = v[:, :, 0]
        self.tokens += 1
        with torch.autocast(v.device.type, enabled=False):  # scores and sums in float32
            score = q.to(v.dtype).float() @ self.keys.float().mT * q.shape[3] ** -0.5
            hidden = ~seen[:, None]  # (H, 1, slots)
            weight = score.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            return (weight.masked_fill(hidden, 0) @ self.values.float()).to(v.dtype)
