"""Positions: rotary ones, and learned ones of rasters (images, or text as a matrix)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RasterPositions(nn.Module):
    """Learned embeddings of each coordinate, added up: where in a raster a token belongs.

    Images are rows, columns and channels; text may be laid out as a matrix of rows and columns.
    Entry ``t`` is the place of token ``t``, which is the token that input ``t`` predicts (input 0
    is the start id). The released code of the source gives input ``t`` the place of the token it
    holds, and the start none; the two differ by one step along the raster.

    Args:
        dim: width of the model.
        shape: how many there are of each coordinate; the last one runs fastest.
        std: standard deviation of the sum, at the start.

    Raises:
        ValueError: unless ``shape`` is two or more positive numbers.

    Source:
        Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 5.3 (n_emb = 3 for images,
        2 for text).
    """

    def __init__(self, dim: int, shape: Sequence[int], std: float):
        super().__init__()
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(
                f"learned positions need two or more sizes, such as model.image_shape=[32,32,3] or "
                f"model.matrix_shape=[96,128], got {list(shape)}; null is for no such positions."
            )
        self.shape = tuple(shape)
        self.coordinates = nn.ModuleList(nn.Embedding(size, dim) for size in shape)
        self.reset(std)

    def reset(self, std: float) -> None:
        """Draw the embeddings anew, so that their sum has this standard deviation."""
        for embedding in self.coordinates:
            nn.init.normal_(embedding.weight, std=std / len(self.shape) ** 0.5)

    def forward(self, length: int, first: int | Tensor = 0) -> Tensor:
        """``length`` entries from number ``first``, ``(L, dim)``.

        Raises:
            ValueError: if the raster has fewer tokens; not if ``first`` is a tensor (), whose value
                only its device knows.
        """
        if not isinstance(first, Tensor) and first + length > math.prod(self.shape):
            raise ValueError(
                f"learned positions reach {math.prod(self.shape):,} tokens {self.shape}, got "
                f"{first + length:,}; shorten the sequence (data.length, context), or train with a "
                f"larger model.matrix_shape."
            )
        token = first + torch.arange(length, device=self.coordinates[0].weight.device)
        total = 0
        for size, embedding in zip(reversed(self.shape), reversed(self.coordinates), strict=True):
            total = total + embedding(token % size)
            token = token // size
        return total


def rotary_tables(
    length: int, head_size: int, base: float, device: torch.device, first: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of ``length`` positions from number ``first``.

    Two float32 tensors ``(L, head_size / 2)``; ``first`` is an int or a tensor ().

    Source:
        RoFormer, Su et al. 2021, arXiv:2104.09864, eq. 15; wavelengths from 2 pi to 2 pi ``base``.
    """
    pairs = torch.arange(0, head_size, 2, device=device, dtype=torch.float32)
    position = torch.arange(length, device=device, dtype=torch.float32) + first
    angle = position[:, None] * base ** (-pairs / head_size)
    return angle.cos(), angle.sin()
