"""Feed-forward layers: modules made with ``(dim, hidden, own keywords)``, ``(..., dim)`` to it.

``hidden`` is the width inside; None takes the default of the layer. The last map, ``out``, starts
at zero.
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

    def __init__(self, dim: int, hidden: int | None = None):
        super().__init__()
        hidden = _width(hidden, default=-(-8 * dim // (3 * 64)) * 64)
        self.gate_and_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        nn.init.normal_(self.gate_and_up.weight, std=self.gate_and_up.in_features**-0.5)
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
        self, dim: int, hidden: int | None = None, *, activation: str = "gelu", bias: bool = True
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation}; change "
                f"`model.block.feed_forward.activation`."
            )
        hidden = _width(hidden, default=4 * dim)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        nn.init.normal_(self.up.weight, std=self.up.in_features**-0.5)
        nn.init.zeros_(self.out.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))


def _width(hidden: int | None, default: int) -> int:
    if hidden is not None and hidden < 1:
        raise ValueError(
            f"model.block.feed_forward.hidden must be at least 1 or null, got {hidden}."
        )
    return default if hidden is None else hidden
