"""What an optimizer step does, and what of it is logged."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hydra.utils import instantiate

from evaluation.measures import bits_per_byte
from tests.support.configs import SMALL, composed
from tests.support.tiny import LENGTH, TinyData, fit, muon_task, rows, tiny_task
from training import schedules
from training.callbacks.averaging import EMAWeightAveraging
from training.callbacks.checkpoints import Checkpoints
from training.callbacks.interruption import Interruption
from training.callbacks.progress_bar import ProgressBar
from training.callbacks.throughput import Throughput
from training.optim import optimizers
from training.optim.muon import BatchedMuon

ROOT = Path(__file__).parents[2]


class SaveAt(L.Callback):
    """Writes a checkpoint after one optimizer step, as the last callback."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, task, outputs, batch, index):
        if trainer.global_step == self.step and (index + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.path)


def poison(task, steps):
    """Make the gradient of the embedding not finite at these optimizer steps."""

    def spoil(gradient):
        return gradient * float("nan") if task.trainer.global_step in steps else gradient

    task.model.embedding.weight.register_hook(spoil)
    return task


def in_processes(output, devices, **settings):
    """What rank 0 logs of a run of ``tests/support/tiny.py``, started as a user starts it."""
    arguments = json.dumps({"devices": devices, "strategy": "ddp", **settings})
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/tiny.py"), str(output), arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "lightning" not in run.stderr, run.stderr  # none of its hints
    metrics = json.loads((output / "metrics.json").read_text())
    return {int(step): row for step, row in metrics.items()}


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon in shares"])
def test_two_processes_give_the_curve_of_one_with_the_same_global_batch(tmp_path, muon):
    settings = {"max_steps": 100, "validate_every": 50}
    _, one = fit(tmp_path, muon_task() if muon else tiny_task(), **settings)
    two = in_processes(tmp_path, 2, muon=muon, **settings)
    for key in ("train/loss_nats", "train/gradient_norm", "val/bits_per_byte"):
        curve = {step: row[key] for step, row in two.items() if key in row}
        assert curve == pytest.approx(one.curve(key), abs=1e-5), key
    assert len(one.curve("train/loss_nats")) == 100


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_curve_of_one_that_takes_their_shares_in_turn(tmp_path):
    # The limit in minutes is far, but both agree on the time after every step.
    settings = {"max_steps": 20, "max_minutes": 60.0, "accelerator": "gpu"}
    _, one = fit(tmp_path, data=TinyData(accumulation=2), **settings)
    two = in_processes(tmp_path, 2, **settings)
    for key in ("train/loss_nats", "train/gradient_norm", "val/bits_per_byte"):
        curve = {step: row[key] for step, row in two.items() if key in row}
        assert curve == pytest.approx(one.curve(key), abs=1e-5), key


def test_in_bf16_two_processes_give_the_curve_of_one_that_takes_their_shares_in_turn(tmp_path):
    # A pass rounds each weight's gradient to bf16: whole batches are rounded once, halves twice.
    settings = {"max_steps": 100, "validate_every": 50, "precision": "bf16-mixed"}
    _, one = fit(tmp_path, data=TinyData(accumulation=2), **settings)
    two = in_processes(tmp_path, 2, **settings)
    for key in ("train/loss_nats", "train/gradient_norm", "val/bits_per_byte"):
        curve = {step: row[key] for step, row in two.items() if key in row}
        assert curve == pytest.approx(one.curve(key), abs=1e-6), key


def test_accumulating_two_micro_batches_changes_nothing_but_memory(tmp_path):
    whole, one = fit(tmp_path, max_steps=20)
    halves, two = fit(tmp_path, data=TinyData(accumulation=2), max_steps=20)
    for key in ("train/loss_nats", "train/gradient_norm", "val/bits_per_byte"):
        assert two.curve(key) == pytest.approx(one.curve(key), abs=1e-5), key
    assert whole.global_step == halves.global_step == 20


@pytest.mark.parametrize("averaging", [False, True], ids=["plain", "averaged"])
def test_a_resumed_run_with_dropout_repeats_the_uninterrupted_one_exactly(tmp_path, averaging):
    def run(*callbacks, **settings):
        average = [EMAWeightAveraging(decay=0.5)] if averaging else []
        return fit(
            tmp_path,
            tiny_task(dropout=0.5),
            TinyData(accumulation=2),
            callbacks=[*average, *callbacks],
            max_steps=8,
            validate_every=4,
            **settings,
        )

    _, whole = run(SaveAt(4, tmp_path / "last.ckpt"))
    torch.rand(100)  # the state of the global generator must not matter
    _, rest = run(resume=tmp_path / "last.ckpt")
    assert rest.metrics == {step: whole.metrics[step] for step in (5, 6, 7, 8)}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4)])
def test_a_run_may_be_resumed_with_other_micro_batches(tmp_path, before, after):
    keeper = SaveAt(3, tmp_path / "last.ckpt")
    _, whole = fit(tmp_path, data=TinyData(before), callbacks=[keeper], max_steps=7)
    _, rest = fit(tmp_path, data=TinyData(after), resume=keeper.path, max_steps=7)
    expected = {step: whole.curve("train/loss_nats")[step] for step in (4, 5, 6, 7)}
    assert rest.curve("train/loss_nats") == pytest.approx(expected, abs=1e-5)


def test_after_a_resume_the_config_decides_on_the_optimizers_settings(tmp_path):
    keeper = SaveAt(3, tmp_path / "last.ckpt")
    fit(tmp_path, callbacks=[keeper])
    other = partial(optimizers.adamw, lr=1e-4, betas=(0.8, 0.9), weight_decay=0.3, eps=1e-8)
    trainer, rest = fit(tmp_path, tiny_task(optimizer=other), resume=keeper.path)
    assert max(rest.curve("train/learning_rate").values()) <= 1e-4
    group = trainer.optimizers[0].param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.3, (0.8, 0.9))


def test_dropout_differs_between_micro_batches_steps_and_ranks():
    task, drawn = tiny_task(), []
    for step, micro, rank in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        task._trainer = SimpleNamespace(global_step=step, global_rank=rank)
        task._micro_batches = [None] * micro
        task._seed_generators()
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 4


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    task = poison(tiny_task(), steps={2})
    keepers = [SaveAt(step, tmp_path / f"{step}.ckpt") for step in (2, 3, 4)]
    _, recorder = fit(tmp_path, task, callbacks=keepers)
    before, skipped, after = (
        torch.load(keeper.path, weights_only=True)["state_dict"] for keeper in keepers
    )
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert not torch.equal(skipped["model.head.weight"], after["model.head.weight"])
    assert list(recorder.curve("train/skipped_steps").values()) == [0, 0, 1, 1, 1, 1]
    assert math.isnan(recorder.curve("train/gradient_norm")[3])


def decides_on_the_device(model):
    """Muon and AdamW as on a GPU: whether they step is never asked for on the host."""
    matrices, rest = optimizers._split(model, lambda name, p: "blocks" in name and p.dim() == 2)
    muon = BatchedMuon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05)
    return optimizers.Combined(muon, torch.optim.AdamW(rest, lr=1e-2, fused=True))


def test_a_step_that_is_skipped_on_the_device_moves_neither_weights_nor_state(tmp_path):
    task = poison(tiny_task(optimizer=decides_on_the_device), steps={2})
    keepers = [SaveAt(step, tmp_path / f"{step}.ckpt") for step in (2, 3, 4)]
    _, recorder = fit(tmp_path, task, callbacks=keepers, log_every=3)
    before, skipped, after = (torch.load(keeper.path, weights_only=True) for keeper in keepers)
    for kept in (lambda c: c["state_dict"], lambda c: c["optimizer_states"][0]["state"]):
        torch.testing.assert_close(kept(skipped), kept(before), rtol=0, atol=0)
    weight = "model.blocks.0.1.weight"
    assert not torch.equal(skipped["state_dict"][weight], after["state_dict"][weight])
    assert skipped["skipped_steps"] == [1, 1]
    assert recorder.curve("train/skipped_steps") == {3: 1, 6: 1}


def test_skipping_is_decided_alike_on_the_host_and_on_the_device(tmp_path):
    def run(optimizer):
        task = poison(tiny_task(optimizer=optimizer), steps={2, 4})
        return fit(tmp_path, task, max_steps=8)[1].curve("train/loss_nats")

    def on_the_host(model):
        made = decides_on_the_device(model)
        made._step_supports_amp_scaling = False
        return made

    assert run(decides_on_the_device) == pytest.approx(run(on_the_host), abs=1e-6)


def test_a_run_that_only_skips_steps_on_the_device_is_ended_when_it_is_logged(tmp_path):
    task = poison(tiny_task(optimizer=decides_on_the_device), steps=range(3, 13))
    with pytest.raises(FloatingPointError, match=r"not finite in 10 .* step 16 or one shortly"):
        fit(tmp_path, task, max_steps=20, log_every=8)


class NothingIsRead(L.Callback):
    """Refuses what would wait for a GPU, from the first hook of each step that is not logged."""

    READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, monkeypatch):
        self.patch, self.steps = monkeypatch, []

    def on_train_batch_start(self, trainer, *_):
        self.patch.undo()
        if (trainer.global_step + 1) % trainer.log_every_n_steps:
            self.steps.append(trainer.global_step + 1)
            for name in self.READS:
                self.patch.setattr(torch.Tensor, name, self._refuse)

    def _refuse(self, *_, **__):
        raise AssertionError(f"a tensor is read in step {self.steps[-1]}")


@pytest.mark.parametrize("minutes", [None, 60.0], ids=["steps", "minutes"])
def test_nothing_is_read_from_the_device_in_a_step_that_is_not_logged(
    tmp_path, monkeypatch, minutes
):
    (tmp_path / "config.yaml").touch()
    watch = NothingIsRead(monkeypatch)
    fit(
        tmp_path,
        tiny_task(optimizer=decides_on_the_device),
        TinyData(accumulation=2),
        callbacks=[
            watch, Throughput(), ProgressBar(), Interruption(), EMAWeightAveraging(decay=0.9),
            Checkpoints(tmp_path, every_steps=4),
        ],
        max_steps=8,
        max_minutes=minutes,
        log_every=4,
    )  # fmt: skip
    assert sorted(set(watch.steps)) == [1, 2, 3, 5, 6, 7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["dense", "bigbird", "longformer"])
def test_no_step_that_is_not_logged_waits_for_the_gpu(tmp_path, model, optimizer):
    class NothingWaits(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            logged = (trainer.global_step + 1) % trainer.log_every_n_steps == 0
            compiles = trainer.global_step < trainer.log_every_n_steps
            torch.cuda.set_sync_debug_mode("default" if logged or compiles else "error")

        def on_exception(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    config = composed(
        f"model={model}", f"optimizer={optimizer}", *SMALL, "data.vocab_size=16", "data.length=8"
    )
    task = tiny_task(optimizer=instantiate(config.optimizer))
    task.model = instantiate(config.model)
    (tmp_path / "config.yaml").touch()
    callbacks = [
        NothingWaits(), Throughput(), ProgressBar(), Interruption(), EMAWeightAveraging(decay=0.9),
        Checkpoints(tmp_path, every_steps=4),
    ]  # fmt: skip
    fit(
        tmp_path, task, callbacks=callbacks, accelerator="gpu", compile="auto", max_steps=12,
        log_every=4,
    )  # fmt: skip


def test_an_average_is_what_lightnings_own_is(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging as Lightnings

    checkpoints = []
    for average in (Lightnings, EMAWeightAveraging):
        keeper = SaveAt(6, tmp_path / "last.ckpt")
        fit(tmp_path, callbacks=[average(decay=0.5), keeper])
        checkpoints.append(torch.load(keeper.path, weights_only=True))
    theirs, ours = checkpoints
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"])
    assert ours["averaging_state"] == theirs["averaging_state"] == {"n_averaged": 6}
    assert ours["callbacks"].keys() == theirs["callbacks"].keys()


def test_a_run_that_only_skips_steps_is_ended_with_one_sentence(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite in 10 optimizer steps in a row"):
        fit(tmp_path, poison(tiny_task(), steps=range(3, 20)), max_steps=20)


def test_the_gradient_is_clipped_to_its_limit_and_logged_as_it_was(tmp_path):
    sgd = partial(sgd_of_model, lr=1.0)
    constant = partial(schedules.cosine, warmup_steps=0, final=1.0)
    task = tiny_task(optimizer=sgd, schedule=constant)
    start = [p.detach().clone() for p in task.model.parameters()]
    _, recorder = fit(tmp_path, task, max_steps=1, gradient_clip=0.25)
    moved = [p.detach() - q for p, q in zip(task.model.parameters(), start, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.25, rel=1e-4)
    assert recorder.curve("train/gradient_norm")[1] > 0.5


def test_without_a_limit_the_gradient_is_logged_and_left_alone(tmp_path):
    _, free = fit(tmp_path, gradient_clip=None)
    _, wide = fit(tmp_path, gradient_clip=1e6)
    assert free.metrics == wide.metrics


def sgd_of_model(model, lr):
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_validation_is_a_mean_over_tokens_not_over_batches(tmp_path):
    task = tiny_task()
    _, recorder = fit(tmp_path, task, max_steps=1)
    held_out = rows(5, seed=-1)
    held_out[-1, -3:] = -1  # as `TinyData` pads: the last batch has fewer tokens
    task.model.eval()
    with torch.no_grad():
        nats, count = task.model.loss(held_out[:, :-1].clamp(min=0), held_out[:, 1:])
    assert count == 5 * LENGTH - 3
    expected = bits_per_byte(nats.item(), count.item())
    assert recorder.curve("val/bits_per_byte")[1] == pytest.approx(expected, rel=1e-6)


def test_a_wrong_schedule_is_refused_before_the_first_step(tmp_path):
    wrong = partial(schedules.cosine, warmup_steps=2, final=3.0)
    with pytest.raises(ValueError, match=r"final=3.0.*schedule.final"):
        fit(tmp_path, tiny_task(schedule=wrong))


def test_a_checkpoint_holds_only_tensors_and_plain_values(tmp_path):
    trainer, _ = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
