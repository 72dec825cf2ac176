"""Rotary positions."""

import torch
from torch import Tensor


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
