"""What every attention is: a module made with ``(dim, heads, layer, *, its own keywords)``.

``forward(x, context)`` maps ``(B, L, dim)`` to ``(B, L, dim)``, and ``pattern`` says which keys
are visible. The Transformer supplies ``dim``, ``heads`` and ``layer``; the yaml supplies the rest.
A new attention is one file here and one yaml in ``conf/model``.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What the layers of one forward pass share.

    Args:
        rotary: cosines and sines of the positions, two tensors ``(L, D / 2)``; None: no rotary
            positions.
        documents: number of each token's document ``(B, L)``, non-decreasing int32: a token sees
            none of another document; None: all tokens are of one.
    """

    rotary: tuple[Tensor, Tensor] | None
    documents: Tensor | None = None
