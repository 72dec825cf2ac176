"""Which tiles of keys each tile of queries visits, as a compressed list."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TileList:
    """Live tiles of every head, row by row (compressed sparse rows).

    Row ``h * query_tiles + n`` holds the key tiles that query tile ``n`` of head ``h`` visits:
    ``keys[offsets[row] : offsets[row + 1]]``, ascending.

    Args:
        offsets: ``(heads * query_tiles + 1)`` int32.
        keys: key tile numbers, ``(live tiles)`` int32.
        full: whether every cell of the tile is visible, ``(live tiles)`` bool.
        shape: tiles of (queries, keys).
        tile: tokens of a tile of (queries, keys).
    """

    offsets: Tensor
    keys: Tensor
    full: Tensor
    shape: tuple[int, int]
    tile: tuple[int, int]

    @classmethod
    def from_layout(cls, layout: Tensor, tile: tuple[int, int]) -> "TileList":
        """List the true tiles of ``layout (heads, query tiles, key tiles)`` bool, none as full."""
        heads, queries, keys = layout.shape
        offsets = torch.zeros(heads * queries + 1, dtype=torch.int32, device=layout.device)
        offsets[1:] = layout.sum(dim=2).flatten().cumsum(0)
        numbers = layout.nonzero()[:, 2].int()
        full = torch.zeros_like(numbers, dtype=torch.bool)
        return cls(offsets, numbers, full, (queries, keys), tile)

    def __len__(self) -> int:
        """Live tiles over all heads."""
        return len(self.keys)

    @property
    def heads(self) -> int:
        return (len(self.offsets) - 1) // self.shape[0]

    def layout(self) -> Tensor:
        """The listed tiles, ``(heads, query tiles, key tiles)`` bool."""
        rows = self.heads * self.shape[0]
        layout = torch.zeros(rows, self.shape[1], dtype=torch.bool, device=self.keys.device)
        row = torch.arange(rows, device=self.keys.device)
        layout[row.repeat_interleave(self.offsets.diff()), self.keys.long()] = True
        return layout.view(self.heads, *self.shape)
