"""The arguments of `attend` besides q, k and v, and how they pass through an operator of torch."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from kernels.attend.work import ListedWork
from kernels.patterns import Pattern, parse
from kernels.patterns.tiles import TileList

# What ``Call.flatten`` gives. An operator takes numbers and tensors: the pattern is its text. (No
# lists of tensors, for which torch has no batched gradients.)
SCHEMA = (
    "float scale, ScalarType out_dtype, int[] list_sizes, "
    "Tensor pattern, Tensor? documents, Tensor? q_position, Tensor? k_position, "
    "Tensor? list1, Tensor? list2, Tensor? list3, Tensor? list4, Tensor? list5, Tensor? list6"
)
NUMBERS, TENSORS = 3, 4  # arguments of either kind before those of a list


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
        """The arguments of the operators, in the order of ``SCHEMA``; fake ones for a fake q."""
        parts, sizes = (None,) * 6, []
        if self.listed is not None:
            *parts, sizes = self.listed.flatten()
        elif self.tiles is not None:
            parts, sizes = _flat_tiles(self.tiles)
        text = self.pattern.encoded
        if type(q) is FakeTensor and not q.fake_mode.allow_non_fake_inputs:
            text = q.fake_mode.from_tensor(text, static_shapes=True)
        where = self.documents, self.q_position, self.k_position
        return (self.scale, self.out_dtype, sizes, text, *where, *parts)

    @classmethod
    def rebuild(
        cls, scale, out_dtype, sizes, text, documents, q_position, k_position, *parts
    ) -> "Call":
        """The call that was flattened."""
        is_work = parts[-1] is not None
        return cls(
            _decoded(text.numpy().tobytes()),
            scale,
            out_dtype,
            documents if documents is None else documents.contiguous(),
            q_position,
            k_position,
            tiles=_tiles(parts, sizes) if sizes and not is_work else None,
            listed=ListedWork.rebuild(*parts, sizes) if is_work else None,
        )


def with_work(arguments: tuple, device: torch.device) -> tuple:
    """Flat arguments whose tile list, if they have one, is work for kernels on a device."""
    scale, out_dtype, sizes, *tensors = arguments
    parts = tensors[TENSORS:]
    if not sizes or parts[-1] is not None:
        return arguments
    *parts, sizes = ListedWork.of(_tiles(parts, sizes), device).flatten()
    return (scale, out_dtype, sizes, *tensors[:TENSORS], *parts)


def _flat_tiles(tiles: TileList) -> tuple[tuple, list[int]]:
    parts = tiles.offsets, tiles.keys, tiles.full, None, None, None
    return parts, [*tiles.shape, *tiles.tile, tiles.residues]


def _tiles(parts: tuple, sizes: list[int]) -> TileList:
    rows, columns, *tile, residues = sizes
    return TileList(*parts[:3], (rows, columns), tuple(tile), residues)


@functools.lru_cache(maxsize=1024)
def _decoded(text: bytes) -> Pattern:
    return parse(text.decode())
