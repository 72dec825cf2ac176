"""What every attention is: a module made with ``(dim, heads, layer, *, its own keywords)``.

``forward(x, context)`` maps ``(B, L, dim)`` to ``(B, L, dim)``, ``pattern`` says which keys are
visible, and ``cache(length)`` makes what decoding keeps. The Transformer supplies ``dim``,
``heads`` and ``layer``; the yaml supplies the rest. A new attention is one file here and one yaml
in ``conf/model``.
"""

from dataclasses import dataclass

from torch import Tensor

from models.cache.key_value import KeyValueCache


@dataclass(frozen=True)
class Context:
    """What the layers of one forward pass share, and what each keeps from pass to pass.

    Args:
        rotary: cosines and sines of the positions, two tensors ``(L, D / 2)``; None: no rotary
            positions.
        documents: number of each token's document ``(B, L)``, non-decreasing int32: a token sees
            none of another document; None: all tokens are of one.
        cache: takes the keys and values of this layer, and has those of the tokens before these;
            None: these tokens are all.
    """

    rotary: tuple[Tensor, Tensor] | None
    documents: Tensor | None = None
    cache: KeyValueCache | None = None
