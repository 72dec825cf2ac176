"""When checkpoints are written: `last.ckpt` to continue a run, `best.ckpt` to use its model."""

import math
from pathlib import Path
from typing import Any

import lightning as L


class Checkpoints(L.Callback):
    """Writes `checkpoints/last.ckpt` and `checkpoints/best.ckpt` of a run.

    `last` is written every ``every_steps`` optimizer steps, after each validation, and when the
    run is stopped; `best` when the measure of the data (``val/bits_per_byte``, say) is lower than
    ever before. Both hold all that resuming needs and, under ``config``, the run's configuration as
    text. `EndOfStep` has them written between steps alone: no checkpoint holds the gradients that
    micro-batches accumulate.

    Args:
        output: the run's folder, with its `config.yaml`.
        every_steps: optimizer steps between two saves.
    """

    def __init__(self, output: str, every_steps: int):
        if every_steps < 1:
            raise ValueError(
                f"callbacks.checkpoints.every_steps must be at least 1, got {every_steps}."
            )
        self.config = Path(output) / "config.yaml"
        self.last = Path(output) / "checkpoints" / "last.ckpt"
        self.best = Path(output) / "checkpoints" / "best.ckpt"
        self.every_steps = every_steps
        self.lowest = math.inf
        self.saved_step = -1

    def save_if_due(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt` at its interval, and when the run stops."""
        if trainer.global_step % self.every_steps == 0 or trainer.should_stop:
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if trainer.global_step == 0:
            return  # nothing has been learned yet
        score = trainer.callback_metrics[f"val/{trainer.datamodule.measure}"].item()
        if score < self.lowest:
            self.lowest = score
            trainer.save_checkpoint(self.best)
        self._save_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        # Data never end, so this is the end of training; and `on_train_end` would be too late,
        # because weight averaging has overwritten the weights by then.
        self._save_last(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero:  # the only process that writes; others may not see the folder
            checkpoint["config"] = self.config.read_text()

    def state_dict(self) -> dict[str, float]:
        return {"lowest": self.lowest}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.best.exists():  # else the record is that of the folder this run was taken from
            self.lowest = state["lowest"]

    def _save_last(self, trainer: L.Trainer) -> None:
        if self.saved_step != trainer.global_step:
            trainer.save_checkpoint(self.last)
            self.saved_step = trainer.global_step
