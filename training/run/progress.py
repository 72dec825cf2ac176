"""How far a run is: by steps, by minutes, or by whichever of the two is further."""

import logging
import time

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from training.run.agreement import Largest

log = logging.getLogger("strider")


class Stopwatch:
    """Adds up the seconds between each ``start`` and the following ``stop``."""

    def __init__(self):
        self.seconds = 0.0
        self._started = 0.0

    @property
    def lap(self) -> float:
        """Seconds since the last start."""
        return time.perf_counter() - self._started

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += self.lap


class Budget(L.Callback):
    """Stops a run after ``max_steps`` optimizer steps or ``max_minutes`` of training.

    Minutes are those of training alone: waiting for data and the first step's compilation count,
    validation, checkpoints and other callbacks do not. The task starts ``clock`` after the last
    callback of a batch, and it is stopped here, in the first one of the next batch; when a step is
    logged, only after the device has finished it. `EndOfStep` measures the progress.

    Args:
        max_steps: optimizer steps, counted from the very first start; None: no such limit.
        max_minutes: minutes of training over all resumed parts; None: no such limit.

    Raises:
        ValueError: if there is no limit, or one is not positive.
    """

    def __init__(self, max_steps: int | None, max_minutes: float | None):
        if max_steps is None and max_minutes is None:
            raise ValueError(
                "a run needs a limit, got max_steps=null and max_minutes=null; "
                "set `trainer.max_steps` or `trainer.max_minutes`."
            )
        for name, limit in [("max_steps", max_steps), ("max_minutes", max_minutes)]:
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} must be positive, got {limit}; set `trainer.{name}`.")
        self.max_steps = max_steps
        self.max_minutes = max_minutes
        self.progress = 0.0  # share of the run that is done, in [0, 1]; the same on all ranks
        self.clock = Stopwatch()
        self._largest = Largest()
        self._logged = 0  # the last step that was waited for

    @staticmethod
    def of(trainer: L.Trainer) -> "Budget":
        """The budget among a trainer's callbacks."""
        return next(c for c in trainer.callbacks if isinstance(c, Budget))

    @property
    def spent(self) -> bool:
        return self.progress >= 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._logged = trainer.global_step
        if self.max_minutes is not None:
            rank_zero_only(log.info)(
                "the run is limited by minutes (trainer.max_minutes=%g), which depend on the "
                "machine: it is not reproducible bit for bit",
                self.max_minutes,
            )

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        step, device = trainer.global_step, trainer.strategy.root_device
        if step % trainer.log_every_n_steps == 0 and step != self._logged:
            self._logged = step
            if device.type == "cuda":  # logging would wait as well, but outside of the clock
                torch.cuda.synchronize(device)
        self.clock.stop()

    def measure(self, trainer: L.Trainer) -> None:
        """Take the progress of the steps that are done, and stop the run when it is spent."""
        shares = []
        if self.max_steps is not None:
            shares.append(trainer.global_step / self.max_steps)
        if self.max_minutes is not None:  # every rank has its own clock; the first one's counts
            seconds = self.agree(
                self._largest, trainer, self.clock.seconds if trainer.is_global_zero else 0
            )
            shares.append(seconds / 60 / self.max_minutes)
        self.progress = min(1.0, max(shares))
        trainer.should_stop |= self.spent

    def agree(self, largest: Largest, trainer: L.Trainer, number: float) -> float:
        """What ``largest`` says of all processes' numbers; waiting for the devices is training."""
        self.clock.start()
        found = largest(trainer, number)
        self.clock.stop()
        return found

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.clock.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.clock.seconds = state_dict["seconds"]


def count_batches_from_steps(checkpoint: dict, accumulation: int) -> None:
    """Set the batches that a Lightning checkpoint counts to its optimizer steps x accumulation.

    Lightning accumulates by the number of batches, which is another one if the run continues with
    another number of devices or micro-batches. All counters equal means: the last batch is done.
    """
    steps = checkpoint["global_step"]
    loop = checkpoint["loops"]["fit_loop"]
    for scope in ("total", "current"):
        counters = loop["epoch_loop.batch_progress"][scope]
        counters.update(dict.fromkeys(counters, steps * accumulation))
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps


def recount_batches(trainer: L.Trainer) -> None:
    """The same for a run that accumulates otherwise from its next step on.

    To be called in the last hook of a batch, which Lightning counts as completed after it.
    """
    batches = trainer.global_step * trainer.accumulate_grad_batches
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for counters in (progress.total, progress.current):
        counters.ready = counters.started = counters.processed = batches
        counters.completed = batches - 1
