"""The linear maps around an attention: queries, keys and values in, heads out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.elementwise.qkv import split_heads
from models.attention import Context


class Projections(nn.Module):
    """Queries, keys and values, with QK-norm and rotary positions, and the way back.

    The output map starts at zero, so that a new block is the identity.

    Args:
        dim: width of the model, and of all values together.
        heads: number of heads.
        bias: all maps add a learned vector.
        qk_norm: queries and keys are normalised, with a learned gain.
        qk_dim: width of all queries together, and of all keys; None: ``dim``.

    Raises:
        ValueError: if ``qk_dim`` gives a head no whole pairs.

    Source:
        QK-norm: Henry et al. 2020, arXiv:2010.04245, with RMSNorm and a learned gain in place of
        the learned temperature.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bias: bool = False,
        qk_norm: bool = True,
        qk_dim: int | None = None,
    ):
        super().__init__()
        qk_dim = dim if qk_dim is None else qk_dim
        if qk_dim < 1 or qk_dim % (2 * heads):
            raise ValueError(
                f"qk_dim must be an even multiple of heads={heads}, got {qk_dim}; null is the "
                f"width of the model."
            )
        self.dim, self.heads, self.qk_dim = dim, heads, qk_dim
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.q_gain = self.k_gain = None
        if qk_norm:
            self.q_gain, self.k_gain = (
                nn.Parameter(torch.empty(qk_dim // heads)) for _ in range(2)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        nn.init.normal_(self.qkv.weight, std=self.dim**-0.5)
        if self.out is not None:
            nn.init.zeros_(self.out.weight)
        for linear in (self.qkv, self.out):
            if linear is not None and linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.q_gain is not None:
            nn.init.ones_(self.q_gain)
            nn.init.ones_(self.k_gain)

    def check_model(self, rotary: bool) -> None:
        """Refuse rotary positions for queries that are not as wide as the model.

        Raises:
            ValueError: if the model has them and the queries are not.
        """
        if rotary and self.qk_dim != self.dim:
            raise ValueError(
                f"rotary positions need queries as wide as the model ({self.dim}), got "
                f"qk_dim={self.qk_dim}; set model.rotary_base=null."
            )

    def split(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, L, dim)`` -> q, k, v, each ``(B, H, L, D)``, views of ``(B, L, H, D)`` memory."""
        gains = None if self.q_gain is None else (self.q_gain, self.k_gain)
        return split_heads(self.qkv(x), self.heads, self.qk_dim, gains=gains, rotary=context.rotary)

    def join(self, out: Tensor) -> Tensor:
        """``(B, H, L, D)`` -> ``(B, L, dim)``."""
        return self.out(out.transpose(1, 2).flatten(2))


MakeProjections = Callable[[int, int], Projections]  # from (dim, heads)
