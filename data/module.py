"""Lightning data module: every step's rows, whatever the number of devices and workers."""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch.utils.data import DataLoader

from data.corpus import Corpus, Split
from data.masking import EVALUATION, TRAINING, MaskedWindows, Masking
from data.vocabulary import Vocabulary
from data.windows import (
    DOCUMENTS,
    EvaluationWindows,
    Stream,
    TrainingWindows,
    evaluation_order,
    training_samples,
)

TOKENIZER = "tokenizer.model"  # in the run's folder
VALIDATION_TOKENS = 1 << 20  # where data.validation_tokens is null
VALIDATION_TOKENS_ON_CPU = 1 << 16


class SequenceData(L.LightningDataModule):
    """Windows of a corpus, ``(B, length + 1)`` int64: see `data.windows`.

    With masked tokens they are inputs and targets, ``(B, 2, length)``: see `data.masking`.

    A training step sees the same ``batch_tokens`` tokens for any number of devices, workers and
    micro-batches, and training starts at the trainer's ``global_step``, so a resumed run continues
    with the tokens that come next.

    Args:
        corpus: called with ``path`` and ``cache`` (``tokenizer`` and ``vocab_size`` if there is a
            tokenizer to choose, ``exclude_rows`` if rows are left out), gives the `Corpus`.
        name: what reports and run names call the corpus.
        path: a file that is already on disk, or None.
        cache: folder for downloads and unpacked files.
        length: tokens in a window.
        batch_tokens: tokens in an optimizer step, over all devices.
        micro_tokens: tokens in a forward pass of one device; None takes its share in one pass.
        validation_tokens: how many of the first validation tokens are scored; None takes
            1,048,576, or 65,536 on a CPU.
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
    ):
        super().__init__()
        _require_multiple("data.length", length, "", 1)
        _require_multiple("data.batch_tokens", batch_tokens, "data.length", length)
        if micro_tokens is not None:
            _require_multiple("data.micro_tokens", micro_tokens, "data.length", length)
        if validation_tokens is not None:
            _require_multiple("data.validation_tokens", validation_tokens, "", 1)
        if documents not in DOCUMENTS:
            raise ValueError(
                f"data.documents must be one of {', '.join(DOCUMENTS)}, got {documents}."
            )
        choice = {} if tokenizer is None else {"tokenizer": tokenizer, "vocab_size": vocab_size}
        if exclude_rows is not None:
            choice["exclude_rows"] = exclude_rows
        self.corpus = corpus(path=path, cache=cache, **choice)
        _check_images(name, self.corpus.image_shape, image_shape, length, documents)
        self.image_shape = self.corpus.image_shape
        self.documents = documents
        self.name, self.length, self.vocab_size = name, length, vocab_size
        self.batch_tokens, self.micro_tokens = batch_tokens, micro_tokens
        self.validation_tokens = validation_tokens
        self.workers, self.seed = workers, seed
        self.masking = masking
        self._prepared = False

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step, over all devices."""
        return self.batch_tokens

    def accumulation(self, world_size: int) -> int:
        """Forward passes of each of ``world_size`` devices in an optimizer step.

        Raises:
            ValueError: if the batch cannot be shared equally.
        """
        if self.micro_tokens is None:
            unit, size = "devices x data.length", world_size * self.length
            _require_multiple("data.batch_tokens", self.batch_tokens, unit, size)
            return 1
        unit, size = "devices x data.micro_tokens", world_size * self.micro_tokens
        _require_multiple("data.batch_tokens", self.batch_tokens, unit, size)
        return self.batch_tokens // size

    def prepare_data(self) -> None:
        """Download, unpack and check the corpus, once; several processes may do so side by side.

        Raises:
            ValueError, OSError: if it cannot be had, or is shorter than a window.
        """
        if not self._prepared:  # train.py wants to know early, Lightning calls again
            self.corpus.prepare()
            self._check_vocabulary()
            self._training_windows()
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
        return self.corpus.words(split) if self.masking is None else None

    @cached_property
    def validation_words(self) -> int | None:
        """Words of the validation tokens that are scored in training."""
        return self.words(self._validation)

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
        batch = self.batch_tokens // self.length
        order = _TrainingOrder(self.trainer, batch=batch, **self._device_share)
        return self._loader(self._training_windows(), order, workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """This device's part of the validation tokens; all devices have equally many batches."""
        windows = self.evaluation_windows(self._validation, self.length)
        order = evaluation_order(len(windows), **self._device_share)
        # Reading a batch takes microseconds, starting workers for every validation far longer.
        return self._loader(windows, order, workers=0)

    def evaluation_windows(self, split: Split, length: int) -> EvaluationWindows | MaskedWindows:
        """Windows of ``length`` tokens end to end over a split, masked alike at each evaluation.

        Raises:
            ValueError: if ``length`` is not positive.
        """
        _require_multiple("context", length, "", 1)
        return self._masked(EvaluationWindows(self._stream(split), length), EVALUATION)

    def _loader(self, windows: Any, order: Iterable[range], *, workers: int) -> DataLoader:
        return DataLoader(
            windows,
            batch_size=None,  # `windows` makes whole batches
            sampler=order,
            num_workers=workers,
            worker_init_fn=_leave_process_group,
            pin_memory=not self._on_cpu,
            generator=torch.Generator(),  # else each loader draws from the model's random numbers
        )

    @property
    def _validation(self) -> Split:
        default = VALIDATION_TOKENS_ON_CPU if self._on_cpu else VALIDATION_TOKENS
        return self.split("validation").first(self.validation_tokens or default)

    def _training_windows(self) -> TrainingWindows | MaskedWindows:
        windows = TrainingWindows(self._stream(self.split("train")), self.length, self.seed)
        return self._masked(windows, (self.seed, TRAINING))

    def _masked(
        self, windows: TrainingWindows | EvaluationWindows, seed: Sequence[int]
    ) -> TrainingWindows | EvaluationWindows | MaskedWindows:
        if self.masking is None:
            return windows
        return MaskedWindows(windows, self.masking, self.vocab_size, seed)

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
    def _device_share(self) -> dict[str, int]:
        """Which device this is, and how many rows fit its forward pass."""
        world_size = self.trainer.world_size
        passes = world_size * self.accumulation(world_size)
        micro = self.batch_tokens // self.length // passes
        return {"rank": self.trainer.global_rank, "world_size": world_size, "micro": micro}

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.trainer.accelerator, CPUAccelerator)


class _TrainingOrder:
    """Samples from the optimizer step that the trainer is at when iteration begins."""

    def __init__(self, trainer: L.Trainer, **share: int):
        self.trainer, self.share = trainer, share

    def __iter__(self) -> Iterator[range]:
        return training_samples(self.trainer.global_step, **self.share)


def _leave_process_group(worker: int) -> None:
    """Keep Ctrl-C from the workers: the trainer needs them until it has finished its step."""
    os.setpgid(0, 0)


def _check_images(
    name: str,
    shape: tuple[int, int, int] | None,
    configured: Sequence[int] | None,
    length: int,
    documents: str,
) -> None:
    """Refuse windows that are not whole images, for a corpus of images."""
    if (configured and tuple(configured)) != shape:
        wanted = "null" if shape is None else list(shape)
        raise ValueError(f"{name} needs data.image_shape={wanted}, got {configured}.")
    if shape is not None and (length, documents) != (math.prod(shape), "split"):
        raise ValueError(
            f"a window of {name} is a whole image, so it needs data.length={math.prod(shape)} and "
            f"data.documents=split, got {length} and {documents}."
        )


def _require_multiple(key: str, value: int, unit: str, size: int) -> None:
    """Refuse ``value`` unless it is a positive multiple of ``size``, which is called ``unit``."""
    if value < 1 or value % size:
        multiple = f"a multiple of {unit} = {size}" if unit else "at least 1"
        raise ValueError(
            f"{key} must be {multiple}, got {key}={value}; "
            f"set {key}={max(1, round(value / size)) * size} for example."
        )
