"""Feed-forward layers: modules made with ``(dim, hidden)``, ``(..., dim)`` in and out.

Each has its width where ``hidden`` is None, and its last map, ``out``, starts at zero.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.elementwise.swiglu import swiglu


class SwiGLU(nn.Module):
    """``W_out (silu(W_gate x) * W_up x)`` (Shazeer 2020, arXiv:2002.05202).

    ``hidden`` is ``8 / 3 dim`` by default, rounded up to a multiple of 64: as many parameters as an
    `MLP` of ``4 dim``.
    """

    def __init__(self, dim: int, hidden: int | None):
        super().__init__()
        hidden = -(-8 * dim // (3 * 64)) * 64 if hidden is None else hidden
        self.gate_and_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)
        nn.init.normal_(self.gate_and_up.weight, std=dim**-0.5)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(swiglu(self.gate_and_up(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class MLP(nn.Module):
    """``W_out f(W_in x + b_in) + b_out``; ``hidden`` is ``4 dim`` by default.

    Args:
        activation: ``"gelu"`` or ``"quick_gelu"`` (Sparse Transformer, section 5.2).
        bias: both maps add a learned vector.

    Raises:
        ValueError: if the activation is neither.
    """

    def __init__(
        self, dim: int, hidden: int | None, *, activation: str = "gelu", bias: bool = True
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation}; change "
                f"`model.feed_forward.activation`."
            )
        hidden = 4 * dim if hidden is None else hidden
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)
        self.activation = ACTIVATIONS[activation]
        nn.init.normal_(self.up.weight, std=dim**-0.5)
        nn.init.zeros_(self.out.weight)
        if bias:
            nn.init.zeros_(self.up.bias)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))
