"""The arguments of `attend` besides q, k and v, and how they pass through an operator of torch."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attend.work import ListedWork
from kernels.patterns import Pattern, parse
from kernels.patterns.tiles import TileList

# What ``Call.flatten`` gives. An operator takes tensors and numbers: the pattern is its text.
SCHEMA = (
    "Tensor pattern, float scale, ScalarType out_dtype, "
    "Tensor? documents, Tensor? q_position, Tensor? k_position, "
    "Tensor? items, Tensor? cut, Tensor? entries, "
    "Tensor? inverse_items, Tensor? inverse_cut, Tensor? inverse_entries, int[] list_sizes"
)


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

    def flatten(self) -> tuple:
        """The arguments of the operators, in the order of ``SCHEMA``."""
        listed = (None,) * 6 + ([],)
        if self.listed is not None:
            listed = self.listed.flatten()
        text = self.pattern.encoded
        where = self.documents, self.q_position, self.k_position
        return (text, self.scale, self.out_dtype, *where, *listed)

    @classmethod
    def rebuild(cls, text, scale, out_dtype, documents, q_position, k_position, *listed) -> "Call":
        """The call that was flattened."""
        return cls(
            _decoded(text.numpy().tobytes()),
            scale,
            out_dtype,
            documents if documents is None else documents.contiguous(),
            q_position,
            k_position,
            listed=None if listed[0] is None else ListedWork.rebuild(*listed),
        )


@functools.lru_cache(maxsize=1024)
def _decoded(text: bytes) -> Pattern:
    return parse(text.decode())
