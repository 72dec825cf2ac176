"""Masked tokens: which tokens of a window are predicted, and what the model sees in their place."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.batches.batch import Batch, number_documents
from data.batches.windows import PADDING, EvaluationWindows, TrainingWindows

# Behind a window's number in the seed of its masks: no two kinds of draws are ever the same.
TRAINING = 1
EVALUATION = (0, 2)  # no seed of a run: all runs are scored on the same masks


@dataclass(frozen=True)
class Masking:
    """BERT's choice of masked tokens.

    Of every window exactly ``round(share * tokens)`` tokens are predicted, and at least one; start
    ids and padding never. Which ones, and what happens to each, is drawn independently.

    Args:
        share: of the tokens of a window is predicted.
        masked: share of these in whose place the model sees the mask id.
        random: share of these in whose place it sees a token drawn from all; the others stay.

    Raises:
        ValueError: if a share is impossible.

    Source:
        BERT, Devlin et al. 2019, arXiv:1810.04805, section 3.1; a fixed number for each sequence as
        in the released code (create_pretraining_data.py).
    """

    share: float
    masked: float
    random: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or min(self.masked, self.random, 1 - self._changed) < 0:
            raise ValueError(
                f"data.masking needs a share in (0, 1], and masked and random of at least 0 and "
                f"together at most 1, got share={self.share}, masked={self.masked} and "
                f"random={self.random}; BERT has 0.15, 0.8 and 0.1."
            )

    @property
    def _changed(self) -> float:
        return self.masked + self.random

    def apply(self, items: np.ndarray, vocab_size: int, draw: np.random.Generator) -> np.ndarray:
        """Mask one window.

        Args:
            items: ``(L,)`` int64: token ids, start ids (``vocab_size``) and padding.
            vocab_size: number of tokens; the mask id is ``vocab_size + 1``.
            draw: decides.

        Returns:
            Inputs and targets ``(2, L)``. A target that is not scored is -1; padding as an input is
            the start id.
        """
        inputs = np.where(items == PADDING, vocab_size, items)
        targets = np.full_like(items, PADDING)
        tokens = np.flatnonzero(inputs != vocab_size)
        count = min(max(round(self.share * len(tokens)), 1), len(tokens))
        chosen = draw.choice(tokens, count, replace=False)
        targets[chosen] = items[chosen]
        fate = draw.random(count)
        inputs[chosen[fate < self._changed]] = vocab_size + 1
        replaced = chosen[(fate >= self.masked) & (fate < self._changed)]
        inputs[replaced] = draw.integers(vocab_size, size=len(replaced))
        return np.stack([inputs, targets])


class MaskedBatches:
    """Batches in which some tokens of a window are predicted from all others.

    Args:
        windows: what is masked: ``L`` items are ``row[1:]`` of each row.
        masking: how.
        vocab_size: see `Masking.apply`.
        seed: with its number, all that the masks of a window depend on.
        documents: number the documents of each row: several, or one and padding, which no token of
            another document sees; false only for rows of one document without padding.
    """

    def __init__(
        self,
        windows: TrainingWindows | EvaluationWindows,
        masking: Masking,
        vocab_size: int,
        seed: Sequence[int],
        documents: bool,
    ):
        self.windows, self.masking = windows, masking
        self.vocab_size, self.seed, self.documents = vocab_size, seed, documents

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        items = self.windows[numbers][:, 1:]
        rows = [
            self.masking.apply(row, self.vocab_size, self._draw(number))
            for row, number in zip(items, numbers, strict=True)
        ]
        inputs, targets = torch.from_numpy(np.stack(rows, axis=1))
        documents = None
        if self.documents:
            documents = number_documents(torch.from_numpy(items), self.vocab_size)
        return Batch(inputs, targets, documents)

    def _draw(self, number: int) -> np.random.Generator:
        return np.random.default_rng([number, *self.seed])
