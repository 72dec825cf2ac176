"""Lightning data module: every step's batches, whatever the number of devices and workers."""

import itertools
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch.utils.data import DataLoader

from data.batches.batch import Batch, NextTokenBatches
from data.batches.batching import Batching, require_multiple
from data.batches.masking import EVALUATION, TRAINING, MaskedBatches, Masking
from data.batches.windows import (
    DOCUMENTS,
    EvaluationWindows,
    Stream,
    TrainingWindows,
    evaluation_order,
    spread,
    training_samples,
)
from data.corpora import Corpus, Split
from data.prepare.vocabulary import Vocabulary

TOKENIZER = "tokenizer.model"  # in the run's folder
VALIDATION_TOKENS = 1 << 20  # where data.validation_tokens is null
VALIDATION_TOKENS_ON_CPU = 1 << 16


class SequenceData(L.LightningDataModule):
    """Windows of a corpus, each forward pass as a `Batch` of ``(B, length)`` tokens.

    A training step sees the same ``batch_tokens`` tokens for any number of devices, workers and
    micro-batches, and training starts at the trainer's ``global_step``, so a resumed run continues
    with the tokens that come next. A run may have phases, which differ in the numbers of tokens:
    ``length`` and the others are those of the current one, ``phase``, which the trainer moves on.

    Args:
        corpus: called with ``path`` and ``cache`` (``tokenizer`` and ``vocab_size`` if there is a
            tokenizer to choose, ``exclude_rows`` if rows are left out), gives the `Corpus`.
        name: what reports and run names call the corpus.
        path: a file that is already on disk, or None.
        cache: folder for downloads and unpacked files.
        length: tokens in a window.
        batch_tokens: tokens in an optimizer step, over all devices.
        micro_tokens: most tokens in a forward pass of one device; None: no limit, one pass.
        validation_tokens: how many validation tokens are scored, in windows at even distances;
            None takes 1,048,576, or 65,536 on a CPU.
        vocab_size: number of different tokens; the start id is the next number.
        documents: ``"stream"``: the corpus is one text without borders; ``"pack"``: windows run
            across documents, each of which begins with the start id; ``"split"``: each window lies
            inside one document.
        workers: processes that read training rows ahead; 0 reads in the main process.
        seed: of the order of the windows.
        tokenizer: for a corpus that offers several, the name of one.
        exclude_rows: for a corpus with such a choice, a CSV file of rows to leave out of the test.
        image_shape: rows, columns and channels, for a corpus of images.
        masking: which tokens are masked, for models that predict them; None: none.
        phases: the numbers of tokens of each phase of the run; empty: there is one, with those
            above.

    Raises:
        ValueError: if the numbers of tokens do not divide as they must, or a name is unknown.
    """

    def __init__(
        self,
        corpus: Callable[..., Corpus],
        *,
        name: str,
        path: str | None,
        cache: str,
        length: int,
        batch_tokens: int,
        micro_tokens: int | None,
        validation_tokens: int | None,
        vocab_size: int,
        documents: str,
        workers: int,
        seed: int,
        tokenizer: str | None = None,
        exclude_rows: str | None = None,
        image_shape: Sequence[int] | None = None,
        masking: Masking | None = None,
        phases: Sequence[Batching] = (),
    ):
        super().__init__()
        whole_run = Batching("data", 0, length, batch_tokens, micro_tokens)
        self.phases = list(phases) or [whole_run]
        self.phase = 0
        if validation_tokens is not None:
            require_multiple("data.validation_tokens", validation_tokens, "", 1)
        if workers < 0:
            raise ValueError(f"data.workers must be at least 0, got {workers}.")
        if documents not in DOCUMENTS:
            raise ValueError(
                f"data.documents must be one of {', '.join(DOCUMENTS)}, got {documents}."
            )
        choice = {} if tokenizer is None else {"tokenizer": tokenizer, "vocab_size": vocab_size}
        if exclude_rows is not None:
            choice["exclude_rows"] = exclude_rows
        path = None if path is None else str(path)  # a name such as `16` is read as a number
        self.corpus = corpus(path=path, cache=cache, **choice)
        for phase in self.phases:
            _check_images(name, self.corpus.image_shape, image_shape, phase, documents)
        self.image_shape = self.corpus.image_shape
        self.documents = documents
        self.name, self.vocab_size = name, vocab_size
        self.validation_tokens = validation_tokens
        self.workers, self.seed = workers, seed
        self.masking = masking
        self._prepared = False

    @property
    def length(self) -> int:
        """Tokens in a window, of training and of validation."""
        return self.phases[self.phase].length

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step, over all devices."""
        return self.phases[self.phase].batch_tokens

    def accumulation(self, world_size: int) -> int:
        """Forward passes of each of ``world_size`` devices in an optimizer step.

        Raises:
            ValueError: if the batch of any phase cannot be shared equally.
        """
        return [phase.accumulation(world_size) for phase in self.phases][self.phase]

    def prepare_data(self) -> None:
        """Download, unpack and check the corpus, once; several processes may do so side by side.

        Raises:
            ValueError, OSError: if it cannot be had, or is shorter than a window.
        """
        if not self._prepared:  # train.py wants to know early, Lightning calls again
            self.corpus.prepare()
            self._check_vocabulary()
            self._training_batches()  # refuses a window that is longer than the data
            self._prepared = True

    def setup(self, stage: str) -> None:
        if stage == "fit":  # complain before the model is moved to its device
            self.accumulation(self.trainer.world_size)

    @property
    def measure(self) -> str:
        """In which unit results are reported, such as ``bits_per_byte``."""
        if self.masking is None:
            return self.corpus.measure
        return self.corpus.measure.replace("bits_per_", "bits_per_masked_")

    @property
    def units(self) -> np.ndarray:
        """Bytes (or dimensions) that each token stands for, ``(vocab_size,)`` int64."""
        return self.corpus.units

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Turns tokens into text and back; None if the corpus is no text."""
        return self.corpus.vocabulary

    def words(self, split: Split) -> int | None:
        """Words of a part of the corpus, None where no word-level results are reported."""
        documents = zip(split.starts, split.ends, strict=True)
        return self._words(split.tokens[start:end] for start, end in documents)

    @property
    def validation_words(self) -> int | None:
        """Words of the validation tokens that are scored in training."""
        batches, numbers = self._validation
        if self._words([]) is None:
            return None
        return sum(map(self._words_beginning, batches.windows[numbers]))

    def keep_tokenizer(self, folder: str) -> None:
        """Copy a tokenizer that was trained to ``folder``, as `TOKENIZER`; nothing if none was."""
        if self.vocabulary is not None and self.vocabulary.file is not None:
            shutil.copyfile(self.vocabulary.file, Path(folder) / TOKENIZER)

    def split(self, name: str) -> Split:
        """``"train"``, ``"validation"`` or ``"test"``, memory-mapped.

        Raises:
            ValueError: if there is no such split, or nothing in it.
        """
        if name not in self._splits:
            raise ValueError(f"a split is one of {', '.join(self._splits)}, got {name!r}.")
        if len(self._splits[name]) == 0:
            raise ValueError(
                f"the {name} split of {self.name} has no tokens; use a larger file, or give the "
                f"split more with data.corpus.fractions."
            )
        split = self._splits[name]
        return split.without_borders() if self.documents == "stream" else split

    def train_dataloader(self) -> DataLoader:
        """This device's micro-batches from the current optimizer step on, without end."""
        order = _TrainingOrder(self.trainer, self.phases)
        return self._loader(_Phased(self._training_batches()), order, workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """This device's part of the validation tokens; all devices have equally many batches."""
        batches, numbers = self._validation
        share = self.phases[self.phase].share(self.trainer.global_rank, self.trainer.world_size)
        order = evaluation_order(numbers, **share)
        # Reading a batch takes microseconds, starting workers for every validation far longer.
        return self._loader(batches, order, workers=0)

    def evaluation_batches(self, split: Split, length: int) -> NextTokenBatches | MaskedBatches:
        """Windows of ``length`` tokens end to end over a split, masked alike at each evaluation.

        Raises:
            ValueError: if ``length`` is not positive.
        """
        require_multiple("context", length, "", 1)
        windows = EvaluationWindows(self._stream(split), length)
        return self._batches(windows, EVALUATION, padded=True)

    def _loader(self, batches: Any, order: Iterable[Any], *, workers: int) -> DataLoader:
        return DataLoader(
            batches,
            batch_size=None,  # `batches` makes whole ones
            sampler=order,
            num_workers=workers,
            worker_init_fn=_leave_process_group,
            pin_memory=not self._on_cpu,
            generator=torch.Generator(),  # else each loader draws from the model's random numbers
        )

    @property
    def _validation(self) -> tuple[NextTokenBatches | MaskedBatches, Sequence[int]]:
        """Batches of validation, and the numbers of the windows that are scored in training."""
        batches = self.evaluation_batches(self.split("validation"), self.length)
        default = VALIDATION_TOKENS_ON_CPU if self._on_cpu else VALIDATION_TOKENS
        share = (self.validation_tokens or default) / len(self.split("validation"))
        return batches, spread(len(batches), int(share * len(batches)))

    def _words(self, pieces: Iterable[np.ndarray]) -> int | None:
        if self.masking is not None or self.corpus.words(np.empty(0, dtype=np.int64)) is None:
            return None
        return sum(map(self.corpus.words, pieces))

    def _words_beginning(self, row: np.ndarray) -> int:
        """Words whose first token is a target of this window: each word is in one window."""
        pieces = np.split(row, np.flatnonzero(row == self.vocab_size))
        pieces = [piece[(piece >= 0) & (piece < self.vocab_size)] for piece in pieces]
        return self._words(pieces) - self.corpus.words(pieces[0][:1])  # the first input, if any

    def _training_batches(self) -> list[NextTokenBatches | MaskedBatches]:
        """Batches of each phase."""
        stream, padded = self._stream(self.split("train")), self.documents == "split"
        return [
            self._batches(
                TrainingWindows(stream, phase.length, self.seed, phase=n, key=phase.key),
                (self.seed, TRAINING, n),
                padded=padded,
            )
            for n, phase in enumerate(self.phases)
        ]

    def _batches(
        self, windows: TrainingWindows | EvaluationWindows, seed: Sequence[int], *, padded: bool
    ) -> NextTokenBatches | MaskedBatches:
        """What is learned from these windows, some of which may be ``padded`` at their end."""
        pack = self.documents == "pack"
        if self.masking is None:
            return NextTokenBatches(windows, self.vocab_size, pack)
        return MaskedBatches(windows, self.masking, self.vocab_size, seed, pack or padded)

    def _stream(self, split: Split) -> Stream:
        return Stream(split, self.documents, self.vocab_size)

    def _check_vocabulary(self) -> None:
        if self.corpus.vocab_size != self.vocab_size:
            raise ValueError(
                f"{self.name} has {self.corpus.vocab_size} different tokens, got "
                f"data.vocab_size={self.vocab_size}; set data.vocab_size={self.corpus.vocab_size}."
            )

    @cached_property
    def _splits(self) -> dict[str, Split]:
        return self.corpus.open()

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.trainer.accelerator, CPUAccelerator)


class _TrainingOrder:
    """Phase and samples, from the optimizer step that the trainer is at when iteration begins."""

    def __init__(self, trainer: L.Trainer, phases: Sequence[Batching]):
        self.trainer, self.phases = trainer, phases

    def __iter__(self) -> Iterator[tuple[int, range]]:
        now = self.trainer.global_step
        firsts = [phase.first_step for phase in self.phases]
        for n, (first, end) in enumerate(itertools.pairwise([*firsts, sys.maxsize])):
            phase = self.phases[n]
            samples = training_samples(
                range(max(now, first) - first, end - first),
                batch=phase.batch_tokens // phase.length,
                **phase.share(self.trainer.global_rank, self.trainer.world_size),
            )
            yield from ((n, part) for part in samples)


class _Phased:
    """The training batches of all phases, by phase and samples."""

    def __init__(self, phases: Sequence[NextTokenBatches | MaskedBatches]):
        self.phases = phases

    def __getitem__(self, place: tuple[int, range]) -> Batch:
        phase, samples = place
        return self.phases[phase][samples]


def _leave_process_group(worker: int) -> None:
    """Keep Ctrl-C from the workers: the trainer needs them until it has finished its step."""
    os.setpgid(0, 0)


def _check_images(
    name: str,
    shape: tuple[int, int, int] | None,
    configured: Sequence[int] | None,
    phase: Batching,
    documents: str,
) -> None:
    """Refuse windows that are not whole images, for a corpus of images."""
    if (configured and tuple(configured)) != shape:
        wanted = "null" if shape is None else list(shape)
        raise ValueError(f"{name} needs data.image_shape={wanted}, got {configured}.")
    if shape is not None and (phase.length, documents) != (math.prod(shape), "split"):
        raise ValueError(
            f"a window of {name} is a whole image, so it needs "
            f"{phase.key}.length={math.prod(shape)} and data.documents=split, got {phase.length} "
            f"and {documents}."
        )
