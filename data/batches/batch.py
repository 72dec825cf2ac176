"""What a forward pass is given: inputs, targets, and which document each token is of."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.batches.windows import PADDING, EvaluationWindows, TrainingWindows


class Batch(NamedTuple):
    """Rows of one forward pass; the loader pins them and the trainer moves them to its device.

    Attributes:
        inputs: token ids that the model sees, ``(B, L)`` int64.
        targets: token ids that it predicts, ``(B, L)`` int64; -1 is not scored.
        documents: ``(B, L)`` int32, non-decreasing along a row: tokens with different numbers do
            not see each other; None: the tokens of a row all may.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None


def number_documents(items: Tensor, start_id: int) -> Tensor:
    """Number the documents of each row of items ``(B, L)``, from 0: ``(B, L)`` int32.

    Each start id begins one. The padding at the end of a row is one of its own.
    """
    return (items == start_id).cumsum(dim=1, dtype=torch.int32) + (items == PADDING)


class NextTokenBatches:
    """Batches in which each token of a window predicts the one after it.

    Targets that are a start id or padding are not scored. Padding stands at the end of a row, where
    no token of a causal model sees it, so as an input it may be any token: it is 0.

    Args:
        windows: rows ``(B, L + 1)`` of token ids, start ids and padding (-1).
        start_id: what stands before a document.
        pack: a row may hold several documents, which do not see each other.
    """

    def __init__(self, windows: TrainingWindows | EvaluationWindows, start_id: int, pack: bool):
        self.windows, self.start_id, self.pack = windows, start_id, pack

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        return self.batch(torch.from_numpy(self.windows[numbers]))

    def batch(self, rows: Tensor) -> Batch:
        """Rows ``(B, L + 1)`` -> a batch of ``L`` tokens each."""
        items, targets = rows[:, :-1], rows[:, 1:]
        documents = number_documents(items, self.start_id) if self.pack else None
        targets = targets.masked_fill(targets == self.start_id, PADDING)
        return Batch(items.clamp(min=0), targets, documents)
