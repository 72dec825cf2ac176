"""What happens at the end of an optimizer step, and in which order."""

from collections.abc import Sequence
from typing import Any

import lightning as L

from data.batches.batch import Batch
from training.callbacks.checkpoints import Checkpoints
from training.callbacks.interruption import Interruption
from training.callbacks.phases import Phases
from training.callbacks.validation import Validation
from training.run.progress import Budget


class EndOfStep(L.Callback):
    """After the last micro-batch of a step: budget -> validate -> stop -> save -> next phase.

    The budget comes first, because the last step is validated. A validation also writes `best.ckpt`
    and `last.ckpt` (`Checkpoints`). A signal is agreed on after it, so that a run that is continued
    does not repeat it. Then `last.ckpt` is saved if it is due and was not saved yet. A phase begins
    last: what is validated and saved at its border belongs to the phase before.

    The callbacks that are named here have state and other hooks of their own, and stand beside this
    one among the trainer's; the order in which a user lists them does not count.

    Args:
        budget, validation, phases: those of the trainer.
        callbacks: of these, `Interruption` and `Checkpoints` have their turn here.
    """

    def __init__(
        self,
        budget: Budget,
        validation: Validation,
        phases: Phases,
        callbacks: Sequence[L.Callback],
    ):
        self.budget, self.validation, self.phases = budget, validation, phases
        self.interruptions = [c for c in callbacks if isinstance(c, Interruption)]
        self.checkpoints = [c for c in callbacks if isinstance(c, Checkpoints)]

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.budget.measure(trainer)
        self._validate_if_due(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        if not at_step_boundary(trainer, index):
            return
        self.budget.measure(trainer)
        self._validate_if_due(trainer)
        for interruption in self.interruptions:
            interruption.stop_if_signalled(trainer)
        for checkpoints in self.checkpoints:
            checkpoints.save_if_due(trainer)
        if self.phases.done_at(trainer.global_step) and not trainer.should_stop:
            self.phases.begin_next(trainer)

    def _validate_if_due(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        ended = self.phases.done_at(step) or self.budget.spent
        if step == 0 or ended or self.validation.regular(step):
            self.validation.run(trainer)


def at_step_boundary(trainer: L.Trainer, index: int) -> bool:
    """Whether micro-batch ``index``, just finished, completed an optimizer step."""
    return (index + 1) % trainer.accumulate_grad_batches == 0
