"""When held-out data are scored: before the first step, at intervals, at the ends of phases."""

import lightning as L

from training.phases import Phases
from training.run.progress import Budget


class Validation(L.Callback):
    """Runs Lightning's validation loop at step 0, every ``every_steps`` steps, and at the end.

    Where a run has phases, it is validated at the end of each, with windows of that phase's length.
    Lightning's own check counts batches, not steps, and knows neither step 0 nor the end of an
    endless loader. A run that is interrupted or stopped early is not validated once more.

    Args:
        every_steps: optimizer steps between validations; None: only before and after training.

    Raises:
        ValueError: if ``every_steps`` is not positive.
    """

    def __init__(self, every_steps: int | None):
        if every_steps is not None and every_steps < 1:
            raise ValueError(
                f"steps between validations must be positive, got {every_steps}; set "
                f"`trainer.validate_every` to a number of steps, or null for both ends only."
            )
        self.every_steps = every_steps
        self._latest: int | None = None  # step of the latest validation

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validate_if_due(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        self._validate_if_due(trainer)

    def state_dict(self) -> dict[str, int | None]:
        return {"latest": self._latest}

    def load_state_dict(self, state_dict: dict[str, int | None]) -> None:
        self._latest = state_dict["latest"]

    def _validate_if_due(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        regular = self.every_steps is not None and step % self.every_steps == 0
        ended = Phases.of(trainer).done_at(step) or Budget.of(trainer).spent
        due = step == 0 or regular or ended
        if due and step != self._latest:
            self._latest = step
            _validate(trainer)


def _validate(trainer: L.Trainer) -> None:
    """What Lightning's training loop does around a validation of its own."""
    connector = trainer._logger_connector
    first_batch = connector._first_loop_iter
    trainer.lightning_module.zero_grad()  # gradients would only take memory meanwhile
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_batch
