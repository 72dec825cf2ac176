"""Ctrl-C, SIGTERM and SIGUSR1: finish the optimizer step, save, and leave."""

import logging
import os
import signal
from types import FrameType
from typing import Any

import lightning as L

from training.run.agreement import Largest
from training.run.progress import Budget

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption(L.Callback):
    """Stops the run at the next optimizer step after a signal to any of its processes.

    A handler may run in the middle of anything, so it only takes note. At the end of the step (on
    several GPUs, of the one after) all processes learn of it, `Checkpoints` saves, and training
    ends as if its budget were spent (`EndOfStep`). Impatience is served: a second Ctrl-C raises
    `KeyboardInterrupt` at once.

    Attributes:
        signal_received: number of the signal that stopped the run, the same in all processes, or
            None. A program ended by it should leave with status 128 + that number.
    """

    def __init__(self) -> None:
        self.signal_received: int | None = None
        self._largest = Largest()

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        # Lightning has put its own SIGTERM handler in place by now, which would end the run
        # without a checkpoint. When it tears down, it restores what was there before both.
        for number in SIGNALS:
            signal.signal(number, self._take_note)
        # So Lightning sees no SIGTERM, and need not ask all processes about it before every batch,
        # for which each waits until its device has done all its work.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    on_validation_start = on_train_start  # a validation may come before the first step

    def stop_if_signalled(self, trainer: L.Trainer) -> None:
        """Stop the run if any of its processes got a signal; all of them must call this."""
        signalled = self.signal_received or 0
        if number := int(Budget.of(trainer).agree(self._largest, trainer, signalled)):
            self.signal_received = number
            trainer.should_stop = True
            if trainer.is_global_zero:
                logging.getLogger("strider").warning(
                    "%s: saving after step %d and stopping",
                    signal.Signals(number).name,
                    trainer.global_step,
                )

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_received is not None:
            raise KeyboardInterrupt
        self.signal_received = number
        # Neither logging nor print may be entered again from a handler.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")
