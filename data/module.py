"""Lightning data module: every step's rows, whatever the number of devices and workers."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch.utils.data import DataLoader

from data.windows import EvaluationWindows, TrainingWindows, evaluation_windows, training_samples

VALIDATION_TOKENS = 1 << 20  # where data.validation_tokens is null
VALIDATION_TOKENS_ON_CPU = 1 << 16


class Corpus(Protocol):
    """Tokens split in three; `prepare` may download and unpack, `open` only maps into memory."""

    def prepare(self) -> None: ...

    def open(self) -> dict[str, np.ndarray]: ...


class SequenceData(L.LightningDataModule):
    """Windows of a corpus, ``(B, length + 1)`` int64: see `data.windows`.

    A training step sees the same ``batch_tokens`` tokens for any number of devices, workers and
    micro-batches, and training starts at the trainer's ``global_step``, so a resumed run continues
    with the tokens that come next.

    Args:
        corpus: called with ``path`` and ``cache``, gives the `Corpus`.
        name: what reports and run names call the corpus.
        path: a file that is already on disk, or None.
        cache: folder for downloads and unpacked files.
        length: tokens in a window.
        batch_tokens: tokens in an optimizer step, over all devices.
        micro_tokens: tokens in a forward pass of one device; None takes its share in one pass.
        validation_tokens: how many of the first validation tokens are scored; None takes
            1,048,576, or 65,536 on a CPU.
        vocab_size: number of different tokens; the start id is the next number.
        workers: processes that read training rows ahead; 0 reads in the main process.
        seed: of the order of the windows.

    Raises:
        ValueError: if the numbers of tokens do not divide as they must.
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
        workers: int,
        seed: int,
    ):
        super().__init__()
        _require_multiple("data.length", length, "", 1)
        _require_multiple("data.batch_tokens", batch_tokens, "data.length", length)
        if micro_tokens is not None:
            _require_multiple("data.micro_tokens", micro_tokens, "data.length", length)
        if validation_tokens is not None:
            _require_multiple("data.validation_tokens", validation_tokens, "", 1)
        self.corpus = corpus(path=path, cache=cache)
        self.name, self.length, self.vocab_size = name, length, vocab_size
        self.batch_tokens, self.micro_tokens = batch_tokens, micro_tokens
        self.validation_tokens = validation_tokens
        self.workers, self.seed = workers, seed
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
            self._training_windows()
            self._prepared = True

    def setup(self, stage: str) -> None:
        if stage == "fit":  # complain before the model is moved to its device
            self.accumulation(self.trainer.world_size)

    def split(self, name: str) -> np.ndarray:
        """Memory-mapped tokens of ``"train"``, ``"validation"`` or ``"test"``.

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
        return self._splits[name]

    def train_dataloader(self) -> DataLoader:
        """This device's micro-batches from the current optimizer step on, without end."""
        batch = self.batch_tokens // self.length
        order = _TrainingOrder(self.trainer, batch=batch, **self._device_share)
        return self._loader(self._training_windows(), order, workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """This device's part of the validation tokens; all devices have equally many batches."""
        default = VALIDATION_TOKENS_ON_CPU if self._on_cpu else VALIDATION_TOKENS
        tokens = self.split("validation")[: self.validation_tokens or default]
        windows = EvaluationWindows(tokens, self.length, self.vocab_size)
        order = evaluation_windows(len(tokens), self.length, **self._device_share)
        # Reading a batch takes microseconds, starting workers for every validation far longer.
        return self._loader(windows, order, workers=0)

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

    def _training_windows(self) -> TrainingWindows:
        return TrainingWindows(self.split("train"), self.length, self.vocab_size, self.seed)

    @cached_property
    def _splits(self) -> dict[str, np.ndarray]:
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


def _require_multiple(key: str, value: int, unit: str, size: int) -> None:
    """Refuse ``value`` unless it is a positive multiple of ``size``, which is called ``unit``."""
    if value < 1 or value % size:
        multiple = f"a multiple of {unit} = {size}" if unit else "at least 1"
        raise ValueError(
            f"{key} must be {multiple}, got {key}={value}; "
            f"set {key}={max(1, round(value / size)) * size} for example."
        )
