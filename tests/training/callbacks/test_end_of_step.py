"""The order of what happens at the end of a step, in whatever order callbacks are listed."""

import os
import signal

import lightning as L
import pytest

from tests.support.phased import run
from tests.support.tiny import TinyData, fit
from training.callbacks.checkpoints import Checkpoints
from training.callbacks.interruption import Interruption
from training.callbacks.phases import Phases
from training.run.checkpoint import read_checkpoint
from training.run.progress import Budget


class Watch(L.Callback):
    """Notes what happens after which step, and in which phase."""

    def __init__(self):
        self.seen = []

    def note(self, what, trainer):
        self.seen.append((what, trainer.global_step, Phases.of(trainer).index))

    def on_validation_start(self, trainer, task):
        self.progress = Budget.of(trainer).progress
        self.note("validate", trainer)

    def on_save_checkpoint(self, trainer, task, checkpoint):
        self.note("save", trainer)


def test_a_phase_ends_with_a_validation_and_a_checkpoint_before_the_next_begins(tmp_path):
    watch = Watch()
    run(tmp_path / "run", watch)
    at_border = [(what, phase) for what, step, phase in watch.seen if step == 3]
    assert at_border[0] == ("validate", 0)
    assert set(at_border[1:]) == {("save", 0)}
    assert watch.progress == 1  # at the last validation


class Signal(L.Callback):
    """Sends this process a signal while a step is made."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, task, batch, index):
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_step_is_validated_stopped_and_saved_in_this_order(tmp_path, backwards):
    (tmp_path / "config.yaml").touch()
    watch = Watch()
    callbacks = [Signal(2), Interruption(), Checkpoints(tmp_path, 100), watch]
    callbacks = callbacks[::-1] if backwards else callbacks
    trainer, _ = fit(tmp_path, data=TinyData(2), callbacks=callbacks, validate_every=2)
    assert trainer.global_step == 2
    assert [what for what, step, _ in watch.seen if step == 2] == ["validate", "save", "save"]
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == saved["callbacks"]["Validation"]["latest"] == 2
