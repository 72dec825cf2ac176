"""Norms by their name in a yaml."""

from torch import nn

NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


def make_norm(name: str, dim: int) -> nn.Module:
    """RMSNorm (``"rms"``) or LayerNorm (``"layer"``) of the last dimension.

    Raises:
        ValueError: for another name.
    """
    if name not in NORMS:
        raise ValueError(
            f"norm must be one of {', '.join(NORMS)}, got {name}; change `model.block.norm` or "
            f"`model.head.norm`."
        )
    return NORMS[name](dim)
