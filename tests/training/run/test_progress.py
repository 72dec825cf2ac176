"""When a run ends, and how its learning rate follows."""

import logging
import time
from functools import partial

import pytest

from tests.support.tiny import TinyData, fit, tiny_task
from training.run.progress import Budget, Stopwatch
from training.schedules import warmup_stable_decay


class SlowData(TinyData):
    """Two hundredths of a second for every batch, and a tenth for a validation."""

    def _micro_batches(self):
        for batch in super()._micro_batches():
            time.sleep(0.02)
            yield batch

    def val_dataloader(self):
        time.sleep(0.1)
        return super().val_dataloader()


def test_a_run_without_a_limit_is_refused():
    with pytest.raises(ValueError, match=r"trainer.max_steps.*trainer.max_minutes"):
        Budget(None, None)


@pytest.mark.parametrize("limits", [(0, None), (None, 0.0), (-1, 5.0)])
def test_a_limit_that_is_not_positive_is_refused(limits):
    with pytest.raises(ValueError, match="must be positive, got"):
        Budget(*limits)


def test_a_run_limited_by_minutes_stops_and_decays_its_rate_to_the_end(tmp_path, caplog):
    schedule = partial(warmup_stable_decay, warmup_steps=1, decay=1.0, final=0.0)
    with caplog.at_level(logging.INFO, "strider"):
        trainer, recorder = fit(
            tmp_path,
            tiny_task(schedule=schedule),
            SlowData(),
            max_steps=None,
            max_minutes=1 / 60,
        )
    rates = list(recorder.curve("train/learning_rate").values())
    assert 5 < trainer.global_step <= 50  # each step takes more than 0.02 s
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1e-2)
    assert rates[-1] < 2e-3
    assert Budget.of(trainer).progress == 1
    assert caplog.text.count("not reproducible bit for bit") == 1


def test_the_limit_that_is_reached_first_ends_the_run(tmp_path):
    by_steps, _ = fit(tmp_path, max_steps=3, max_minutes=10)
    by_minutes, _ = fit(tmp_path, data=SlowData(), max_steps=10**6, max_minutes=0.1 / 60)
    assert by_steps.global_step == 3
    assert 1 <= by_minutes.global_step < 10


def test_validation_takes_nothing_from_the_minutes(tmp_path):
    trainer, recorder = fit(
        tmp_path, data=SlowData(), max_steps=None, max_minutes=0.3 / 60, validate_every=1
    )
    assert len(recorder.curve("val/bits_per_byte")) == trainer.global_step + 1
    assert Budget.of(trainer).clock.seconds < 0.02 * trainer.global_step + 0.25


def test_a_resumed_run_counts_the_seconds_it_has_already_spent(tmp_path):
    limits = {"max_steps": None, "max_minutes": 0.5 / 60}
    trainer, _ = fit(tmp_path, data=SlowData(), **limits)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, recorder = fit(tmp_path, data=SlowData(), resume=tmp_path / "last.ckpt", **limits)
    assert resumed.global_step == trainer.global_step
    assert not recorder.metrics


def test_a_stopwatch_adds_up_only_what_lies_between_start_and_stop():
    watch = Stopwatch()
    for _ in range(2):
        watch.start()
        time.sleep(0.01)
        watch.stop()
        time.sleep(0.05)
    assert 0.02 <= watch.seconds < 0.1
