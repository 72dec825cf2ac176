"""The linear maps around an attention: queries, keys and values in, heads out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Context
from models.embeddings import rotate


class Projections(nn.Module):
    """Queries, keys and values with QK-norm and rotary positions, and the way back.

    The output map starts at zero, so that a new block is the identity.

    Source:
        QK-norm: Henry et al. 2020, arXiv:2010.04245, with RMSNorm and a learned gain in place of
        the learned temperature.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.q_gain = nn.Parameter(torch.ones(dim // heads))
        self.k_gain = nn.Parameter(torch.ones(dim // heads))
        nn.init.normal_(self.qkv.weight, std=dim**-0.5)
        nn.init.zeros_(self.out.weight)

    def split(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, L, dim)`` -> q, k, v, each ``(B, H, L, D)``, views of ``(B, L, H, D)`` memory."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        q, k = (
            F.rms_norm(t, t.shape[-1:], gain.to(t.dtype))
            for t, gain in ((q, self.q_gain), (k, self.k_gain))
        )
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        return q, k, v

    def join(self, out: Tensor) -> Tensor:
        """``(B, H, L, D)`` -> ``(B, L, dim)``."""
        return self.out(out.transpose(1, 2).flatten(2))
