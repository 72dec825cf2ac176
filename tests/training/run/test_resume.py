"""When checkpoints are written, and that a resumed run is the run that was never interrupted."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.support.tiny import TinyData, fit, tiny_task
from training.callbacks.checkpoints import Checkpoints
from training.callbacks.summary import Summary
from training.run.checkpoint import read_checkpoint


class Crash(L.Callback):
    """Ends a run as a power cut would: right after a micro-batch, before anything is saved."""

    def __init__(self, step, index_in_step):
        self.step, self.index_in_step = step, index_in_step

    def on_train_batch_start(self, trainer, task, batch, index):
        if trainer.global_step == self.step and index % 2 == self.index_in_step:
            raise ConnectionAbortedError


@pytest.fixture
def output(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    return tmp_path


def run(output, every_steps=2, ema=False, crash=None, accumulation=2, steps=6, **settings):
    callbacks = [EMAWeightAveraging(decay=0.9)] if ema else []
    callbacks += [Checkpoints(output, every_steps)] + ([Crash(*crash)] if crash else [])
    return fit(
        output,
        tiny_task(dropout=0.3, schedule=lambda step, progress: 1.0),
        TinyData(accumulation),
        callbacks=callbacks,
        max_steps=steps,
        **settings,
    )


def last(output):
    return read_checkpoint(output / "checkpoints" / "last.ckpt")


def assert_equal(actual, expected):
    """Bitwise: weights, averages and optimizer state."""
    for key in ("state_dict", "optimizer_states", "current_model_state", "averaging_state"):
        torch.testing.assert_close(actual.get(key), expected.get(key), rtol=0, atol=0)


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("crash", [(3, 0), (3, 1), (4, 1)])
def test_a_crashed_run_continues_exactly_with_dropout_averaging_and_accumulation(
    tmp_path, ema, crash
):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _, expected = run(whole, ema=ema, validate_every=3)
    with pytest.raises(ConnectionAbortedError):
        run(parts, ema=ema, crash=crash, validate_every=3)
    saved = last(parts)["global_step"]
    assert saved == crash[0]  # at 3 by validation, at 4 by every_steps
    _, actual = run(parts, ema=ema, resume=parts / "checkpoints" / "last.ckpt", validate_every=3)
    tail = {step: row for step, row in expected.metrics.items() if step > saved}
    assert actual.metrics == tail
    assert_equal(last(parts), last(whole))


@pytest.mark.parametrize("ema", [False, True])
def test_a_finished_run_can_be_extended_exactly(output, tmp_path_factory, ema):
    other = tmp_path_factory.mktemp("whole")
    (other / "config.yaml").touch()
    run(other, ema=ema)
    run(output, ema=ema, steps=3, every_steps=100)
    assert last(output)["global_step"] == 3
    run(output, ema=ema, resume=output / "checkpoints" / "last.ckpt")
    assert_equal(last(output), last(other))


def test_a_run_that_has_nothing_left_to_do_names_the_checkpoint_it_was_given(tmp_path, caplog):
    with caplog.at_level("INFO", "strider"):
        Summary(tmp_path).on_fit_end(SimpleNamespace(ckpt_path="other/last.ckpt"), None)
    assert caplog.messages[-1].endswith("and set resume=other/last.ckpt")


def test_micro_batches_of_another_size_continue_at_the_same_step(output):
    run(output, steps=3, accumulation=1)
    trainer, recorder = run(
        output, resume=output / "checkpoints" / "last.ckpt", accumulation=4, steps=5
    )
    assert list(recorder.curve("train/loss_nats")) == [4, 5]
    assert trainer.fit_loop.epoch_loop.batch_progress.current.completed == 20


def test_the_configuration_travels_in_the_checkpoint_as_text(output):
    run(output, steps=1)
    assert last(output)["config"] == "seed: 1\n"


def test_last_is_written_at_its_interval_and_at_the_end(output):
    steps = []

    class Watch(Checkpoints):
        def on_save_checkpoint(self, trainer, task, checkpoint):
            super().on_save_checkpoint(trainer, task, checkpoint)
            steps.append(trainer.global_step)

    fit(output, callbacks=[Watch(output, 2)], data=TinyData(2), max_steps=5)
    assert steps == [2, 4, 5, 5]  # best and last after the validation at the end


def test_best_is_the_lowest_score_also_after_a_resume(output, monkeypatch):
    scores = iter([9.0, 3.0, 2.0, 4.0])  # at steps 0 to 3

    def run_to(steps, **settings):
        task = tiny_task()
        task.on_validation_epoch_end = lambda: task.log("val/bits_per_byte", next(scores))
        callbacks = [Checkpoints(output, 100)]
        fit(output, task, callbacks=callbacks, max_steps=steps, validate_every=1, **settings)
        return read_checkpoint(output / "checkpoints" / "best.ckpt")["global_step"]

    assert run_to(2) == 2
    assert run_to(3, resume=output / "checkpoints" / "last.ckpt") == 2


def test_a_run_that_cannot_save_ends_with_an_error(output):
    (output / "checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="could not be written"):
        run(output)


def test_an_interval_of_no_steps_is_refused(output):
    with pytest.raises(ValueError, match="every_steps must be at least 1, got 0"):
        Checkpoints(output, 0)
