"""The phase that a run is in: moves the data, the model and the optimizer to the next one."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only

from training.model_settings import adopt_settings
from training.phases import Phase
from training.run.progress import Budget, count_batches_from_steps, recount_batches

log = logging.getLogger("strider")


class Phases(L.Callback):
    """Keeps the data, the accumulation, the model, the optimizer and its schedule in their phase.

    `EndOfStep` moves it on. The state of the optimizer is carried over.

    Args:
        phases: at least one, in their order.
    """

    def __init__(self, phases: Sequence[Phase]):
        self.phases = list(phases)
        self.index = 0

    @staticmethod
    def of(trainer: L.Trainer) -> "Phases":
        """The phases among a trainer's callbacks."""
        return next(c for c in trainer.callbacks if isinstance(c, Phases))

    @property
    def current(self) -> Phase:
        return self.phases[self.index]

    def done_at(self, step: int) -> bool:
        """Whether ``step`` optimizer steps complete the current phase."""
        return self.current.steps == step - self.current.batching.first_step

    def schedule_place(self, trainer: L.Trainer) -> tuple[int, float]:
        """Steps done in the current phase, and the share of it that is done, for a schedule."""
        step = trainer.global_step - self.current.batching.first_step
        if self.current.steps is None:
            return step, Budget.of(trainer).progress
        return step, step / self.current.steps

    def begin_next(self, trainer: L.Trainer) -> None:
        """Begin the next phase, if there is one, in the last hook of a batch."""
        if self.index < len(self.phases) - 1:
            self._enter(self.index + 1, trainer)
            recount_batches(trainer)
            self._announce()

    def setup(self, trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
        self._enter(0, trainer)

    def on_load_checkpoint(
        self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._enter(self._after(checkpoint["global_step"]), trainer)
        count_batches_from_steps(checkpoint, trainer.accumulate_grad_batches)

    def on_save_checkpoint(
        self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # That of the last step, although the next phase may have begun.
        phase = self.phases[self._after(max(trainer.global_step - 1, 0))]
        model = phase.changes.get("model", {})
        checkpoint["phase"] = {"length": phase.batching.length, "model": model}

    def on_fit_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._announce()

    def _after(self, step: int) -> int:
        """The number of the phase that the step after ``step`` steps is in."""
        return sum(phase.batching.first_step <= step for phase in self.phases) - 1

    def _enter(self, index: int, trainer: L.Trainer) -> None:
        self.index = index
        data, task = trainer.datamodule, trainer.lightning_module
        data.phase = index
        trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
        # Lightning keeps the loader of the validation, whose windows are of another length.
        trainer.fit_loop.epoch_loop.val_loop._combined_loader = None
        if (config := self.current.config) is not None:
            adopt_settings(task.model, self.current.make_model())
            task.change_settings(instantiate(config.optimizer), instantiate(config.schedule))
            trainer.gradient_clip_val = config.trainer.gradient_clip

    @rank_zero_only
    def _announce(self) -> None:
        phase = self.current
        if phase.steps is None:
            return  # the run has no phases
        changes = ", ".join(_settings(phase.changes))
        log.info(
            "phase %d of %d: %s steps after step %s%s",
            self.index + 1,
            len(self.phases),
            f"{phase.steps:,}",
            f"{phase.batching.first_step:,}",
            f", with {changes}" if changes else "",
        )


def _settings(changes: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """``{"data": {"length": 8}} -> "data.length=8"``, one text for each value."""
    for name, value in changes.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value}"
