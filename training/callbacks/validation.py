"""Scoring held-out data during training, as often as is asked for."""

import lightning as L


class Validation(L.Callback):
    """Runs Lightning's validation loop, at most once a step; `EndOfStep` says when.

    That is before the first step, every ``every_steps`` steps, and at the end of the run and of
    each phase, with windows of that phase's length. Lightning's own check counts batches, not
    steps, and knows neither step 0 nor the end of an endless loader. A run that is interrupted or
    stopped early is not validated once more.

    Args:
        every_steps: optimizer steps between validations; None: only at both ends.

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

    def regular(self, step: int) -> bool:
        """Whether a validation is asked for after so many steps."""
        return self.every_steps is not None and step % self.every_steps == 0

    def run(self, trainer: L.Trainer) -> None:
        """Validate, unless this step was validated already, before a resume perhaps."""
        if trainer.global_step == self._latest:
            return
        self._latest = trainer.global_step
        # What Lightning's training loop does around a validation of its own.
        connector = trainer._logger_connector
        first_batch = connector._first_loop_iter
        trainer.lightning_module.zero_grad()  # gradients would only take memory meanwhile
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        connector._first_loop_iter = first_batch

    def state_dict(self) -> dict[str, int | None]:
        return {"latest": self._latest}

    def load_state_dict(self, state_dict: dict[str, int | None]) -> None:
        self._latest = state_dict["latest"]
