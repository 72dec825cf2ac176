"""Positions: rotary ones, and the learned ones of images."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ImagePositions(nn.Module):
    """Learned embeddings of row, column and channel, added up: where in an image a token belongs.

    Entry ``t`` is the place of token ``t`` of the image, which is the token that input ``t``
    predicts (input 0 is the start id). The released code of the source gives input ``t`` the place
    of the token it holds, and the start none; the two differ by one step along the raster.

    Args:
        dim: width of the model.
        shape: rows, columns and channels; tokens are in raster order, channels innermost.
        std: standard deviation of the sum of the three, at the start.

    Raises:
        ValueError: unless ``shape`` is three positive numbers.

    Source:
        Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 5.3 (n_emb = 3).
    """

    def __init__(self, dim: int, shape: Sequence[int], std: float):
        super().__init__()
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(
                f"model.image_shape must be [rows, columns, channels], got {list(shape)}; for "
                f"example [32, 32, 3], or null for no such positions."
            )
        self.shape = tuple(shape)
        self.row, self.column, self.channel = (nn.Embedding(size, dim) for size in shape)
        for embedding in (self.row, self.column, self.channel):
            nn.init.normal_(embedding.weight, std=std / 3**0.5)

    def forward(self, length: int) -> Tensor:
        """The first ``length`` entries, ``(L, dim)``.

        Raises:
            ValueError: if an image has fewer tokens.
        """
        if length > math.prod(self.shape):
            raise ValueError(
                f"image positions reach {math.prod(self.shape):,} tokens ({self.shape}), got "
                f"{length:,}; shorten the sequence, or set model.image_shape=null."
            )
        token = torch.arange(length, device=self.row.weight.device)
        _, columns, channels = self.shape
        row, column = token // (columns * channels), token // channels % columns
        return self.row(row) + self.column(column) + self.channel(token % channels)


def rotary_tables(
    length: int, head_size: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, two float32 tensors ``(L, head_size / 2)``.

    Source:
        RoFormer, Su et al. 2021, arXiv:2104.09864, eq. 15; wavelengths from 2 pi to 2 pi ``base``.
    """
    pairs = torch.arange(0, head_size, 2, device=device, dtype=torch.float32)
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = position[:, None] * base ** (-pairs / head_size)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs ``(x[d], x[d + D / 2])`` of ``x (B, H, L, D)`` by their angles, in float32."""
    cos, sin = tables
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)
