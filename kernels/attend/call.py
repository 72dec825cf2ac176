"""The arguments of `attend` besides q, k and v, and how they pass through an operator of torch."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from kernels.attend.work import ListedWork
from kernels.patterns import Pattern, parse
from kernels.patterns.tiles import TileList

# What ``Call.flatten`` gives. An operator takes tensors and numbers: the pattern is its text.
SCHEMA = (
    "float scale, ScalarType out_dtype, int[] list_sizes, Tensor pattern, "
    "Tensor? documents, Tensor? q_position, Tensor? k_position, Tensor[] lists"
)
NUMBERS = 3  # arguments before the tensors


class Call(NamedTuple):
    """The arguments of ``kernels.attend.attend`` besides q, k and v, checked and filled in.

    Args:
        tiles: a tile list of the caller's, which the reference reads; kernels read ``listed``.
        listed: the same list as work for kernels.
    """

    pattern: Pattern
    scale: float
    out_dtype: torch.dtype
    documents: Tensor | None = None
    q_position: Tensor | None = None
    k_position: Tensor | None = None
    tiles: TileList | None = None
    listed: ListedWork | None = None

    def flatten(self, q: Tensor | None = None) -> tuple:
        """The arguments of the operators, in the order of ``SCHEMA``; beside a fake q, fake ones."""
        lists, sizes, tiles = [], [], self.tiles
        if self.listed is not None:
            *lists, sizes = self.listed.flatten()
        elif tiles is not None:
            lists = [tiles.offsets, tiles.keys, tiles.full]
            sizes = [*tiles.shape, *tiles.tile, tiles.residues]
        text = self.pattern.encoded
        if type(q) is FakeTensor:
            text = q.fake_mode.from_tensor(text)
        where = self.documents, self.q_position, self.k_position
        return (self.scale, self.out_dtype, sizes, text, *where, lists)

    @classmethod
    def rebuild(
        cls, scale, out_dtype, sizes, text, documents, q_position, k_position, lists
    ) -> "Call":
        """The call that was flattened."""
        return cls(
            _decoded(text.numpy().tobytes()),
            scale,
            out_dtype,
            documents if documents is None else documents.contiguous(),
            q_position,
            k_position,
            tiles=_tile_list(lists, sizes) if len(lists) == 3 else None,
            listed=ListedWork.rebuild(*lists, sizes) if len(lists) == 6 else None,
        )


def with_work(arguments: tuple, device: torch.device) -> tuple:
    """Flat arguments whose tile list, if they have one, is work for kernels on a device."""
    scale, out_dtype, sizes, *tensors, lists = arguments
    if len(lists) == 3:
        *lists, sizes = ListedWork.of(_tile_list(lists, sizes), device).flatten()
    return (scale, out_dtype, sizes, *tensors, lists)


def _tile_list(lists: list[Tensor], sizes: list[int]) -> TileList:
    rows, columns, *tile, residues = sizes
    return TileList(*lists, (rows, columns), tuple(tile), residues)


@functools.lru_cache(maxsize=1024)
def _decoded(text: bytes) -> Pattern:
    return parse(text.decode())
