"""Training in phases: the table is followed, and a resume is exact in and between phases."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate

from data.batches.batching import Batching
from eval import evaluate
from tests.support.commands import curve, train
from tests.support.configs import SMALL, composed
from tests.support.phased import LENGTHS, RATES, WINDOWS, Windowed, phases, run
from tests.support.tiny import LENGTH
from training.callbacks.progress_bar import ProgressBar
from training.callbacks.throughput import Throughput
from training.model_settings import adopt_settings
from training.phases import Phase, check_phases, read_phases
from training.run.checkpoint import of_phase, read_checkpoint

ROOT = Path(__file__).parents[2]
BOUNDARIES = [3, 7]


class Watch(L.Callback):
    """What each step was made of: rows and tokens of its passes, and the model's windows."""

    def __init__(self):
        self.steps, self.validated = {}, {}

    def on_train_batch_start(self, trainer, task, batch, index):
        seen = trainer.global_step, tuple(task.model.windows)
        self.steps.setdefault(seen, []).append(tuple(batch.targets.shape))

    def on_validation_batch_start(self, trainer, task, batch, index, dataloader_idx=0):
        self.validated[trainer.global_step] = batch.inputs.shape[1]


class Crash(L.Callback):
    """Ends a run as a power cut would, in the last pass of a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, task, batch, index):
        done = (index + 1) % trainer.accumulate_grad_batches == 0
        if trainer.global_step == self.step and done:
            raise ConnectionAbortedError


def last(folder):
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, watch = tmp_path_factory.mktemp("phases") / "whole", Watch()
    return folder, run(folder, watch), watch


def test_each_step_has_the_length_the_batch_and_the_windows_of_its_phase(whole):
    _, _, watch = whole
    expected = {(step, (1, 2)): [(8, LENGTH)] for step in range(3)}
    expected |= {(step, (2, 4)): [(2, 2 * LENGTH)] * 4 for step in range(3, 7)}
    expected |= {(step, (4, 8)): [(2, 4 * LENGTH)] * 2 for step in range(7, 10)}
    assert watch.steps == expected


def test_the_rate_scales_and_warms_up_anew_in_each_phase(whole):
    _, recorder, _ = whole
    rates = list(recorder.curve("train/learning_rate").values())
    shares = [[0.1, 2 / 3, 1.0], [0.1, 0.5, 1.0, 1.0], [0.1, 2 / 3, 1.0]]
    expected = [
        rate * share for rate, in_phase in zip(RATES, shares, strict=True) for share in in_phase
    ]
    assert rates == pytest.approx(expected)


def test_each_phase_ends_with_a_validation_at_its_length(whole):
    _, recorder, watch = whole
    assert list(recorder.curve("val/bits_per_byte")) == [0, 3, 7, 10]
    assert watch.validated == {0: LENGTH, 3: LENGTH, 7: 2 * LENGTH, 10: 4 * LENGTH}


def test_the_phase_is_logged_with_each_step(whole):
    _, recorder, _ = whole
    assert list(recorder.curve("phase").values()) == [1] * 3 + [2] * 4 + [3] * 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [*BOUNDARIES, 5])
def test_a_crashed_run_continues_exactly_in_a_phase_and_at_its_end(tmp_path, whole, step, workers):
    folder, expected, watched = whole
    parts, watch = tmp_path / "parts", Watch()
    with pytest.raises(ConnectionAbortedError):
        run(parts, Crash(step), workers=workers)
    assert last(parts)["global_step"] == step
    resume = parts / "checkpoints" / "last.ckpt"
    actual = run(parts, watch, workers=workers, resume=resume)
    assert actual.metrics == {n: row for n, row in expected.metrics.items() if n > step}
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(last(parts)[key], last(folder)[key], rtol=0, atol=0)
    rest = {place: passes for place, passes in watched.steps.items() if place[0] >= step}
    assert watch.steps == rest


class Stop(L.Callback):
    """Stops a run after a step, as a signal does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, task, outputs, batch, index):
        trainer.should_stop |= trainer.global_step == self.step


@pytest.mark.parametrize("step", BOUNDARIES)
def test_a_run_stopped_at_the_end_of_a_phase_continues_with_the_next(tmp_path, whole, step):
    _, expected, _ = whole
    run(tmp_path / "parts", Stop(step))
    saved = tmp_path / "parts/checkpoints/last.ckpt"
    n = BOUNDARIES.index(step)
    changes = {"windows": WINDOWS[n]} if n else {}  # those of the first phase are the run's
    assert last(tmp_path / "parts")["phase"] == {"length": LENGTHS[n], "model": changes}
    rest = run(tmp_path / "parts", resume=saved)
    assert rest.metrics == {n: row for n, row in expected.metrics.items() if n > step}


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path):
    one = run(tmp_path / "one", dropout=0.0)
    subprocess.run(
        [sys.executable, str(ROOT / "tests/support/phased.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=True,
    )
    two = {int(n): row for n, row in json.loads((tmp_path / "metrics.json").read_text()).items()}
    for key in ("train/loss_nats", "train/gradient_norm", "val/bits_per_byte", "phase"):
        curve_of_two = {step: row[key] for step, row in two.items() if key in row}
        assert curve_of_two == pytest.approx(one.curve(key), abs=1e-5), key


def test_a_phase_begins_with_a_line_and_counts_its_own_operations(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "strider"):
        recorder = run(tmp_path / "run", Throughput(), ProgressBar(), log_every=2)
    lines = [record.getMessage() for record in caplog.records]
    assert (
        "phase 2 of 3: 4 steps after step 3, with data.length=16, data.batch_tokens=128, "
        "data.micro_tokens=32, model.windows=[2, 4], optimizer.lr=0.005"
    ) in lines
    assert sum(line.startswith("phase ") for line in lines) == 3
    assert any(" · phase 2 · " in line for line in lines)
    operations = {2: LENGTH * 3, 6: 2 * LENGTH * 6, 10: 4 * LENGTH * 12}
    for step, flops in operations.items():
        row = recorder.metrics[step]
        counted = row["model_tflops_per_second"] * 1e12 / row["tokens_per_second"]
        assert counted == pytest.approx(flops, rel=1e-5)
    row = recorder.metrics[4]  # one step of 64 tokens in the first phase, one of 128 in the second
    counted = row["model_tflops_per_second"] * 1e12 / row["tokens_per_second"]
    assert counted == pytest.approx((64 * operations[2] + 128 * operations[6]) / 192, rel=1e-5)


def read(phases, *overrides):
    config = composed("data.length=64", "data.batch_tokens=512", f"phases={phases}", *overrides)
    return read_phases(config), config


def test_a_key_that_is_left_out_is_as_in_the_run():
    (one, two), config = read(
        "[{steps: 5}, {steps: 2, data: {length: 128, micro_tokens: 256}, optimizer: {lr: 0.005}}]",
        "optimizer.lr=0.02",
    )
    assert one.batching == Batching("phases[0].data", 0, 64, 512, None)
    assert two.batching == Batching("phases[1].data", 5, 128, 512, 256)
    assert [phase.config.optimizer.lr for phase in (one, two)] == [0.02, 0.005]
    assert two.config.optimizer.adamw_lr == config.optimizer.adamw_lr
    changes = {"data": {"length": 128, "micro_tokens": 256}, "optimizer": {"lr": 0.005}}
    assert (one.changes, two.changes) == ({}, changes)
    assert config.trainer.max_steps == 7


@pytest.mark.parametrize(
    ("override", "steps"),
    [
        ("trainer.max_steps=auto", 10_000),
        ("trainer.max_steps=5", 5),
        ("trainer.max_steps=null", None),
    ],
)
def test_without_phases_the_run_is_one(override, steps):
    (phase,), config = read("null", override)
    assert phase == Phase("data", Batching("data", 0, 64, 512, None))
    assert config.trainer.max_steps == steps


@pytest.mark.parametrize("limit", ["null", "7", "auto"])
def test_the_phases_say_how_long_the_run_is(limit):
    _, config = read("[{steps: 5}, {steps: 2}]", f"trainer.max_steps={limit}")
    assert config.trainer.max_steps == 7


@pytest.mark.parametrize(
    ("phases", "overrides", "message"),
    [
        ("[]", [], r"phases must be null or a list .*, got \[\]"),
        ("{steps: 3}", [], "phases must be null or a list"),
        ("5", [], "phases must be null or a list .*, got 5"),
        ("[3]", [], r"phases\[0\] must be a mapping .*, got 3"),
        ("[{data: {length: 64}}]", [], r"phases\[0\] does not say how long it is"),
        ("[{steps: 3}, {steps: 2, size: 64}]", [], r"phases\[1\].size cannot change in a run"),
        ("[{steps: 3, seed: 2}]", [], r"phases\[0\].seed cannot change in a run; phases change"),
        ("[{steps: 3, data: {seed: 2}}]", [], r"phases\[0\].data.seed cannot change in a run"),
        ("[{steps: 3, trainer: {max_steps: 2}}]", [], r"trainer.max_steps cannot change in a run"),
        ("[{steps: 3, optimizer: {_target_: x}}]", [], r"optimizer._target_ cannot change"),
        ("[{steps: 3, data: {lenght: 2}}]", [], "no key `lenght`; did you mean `length`"),
        ("[{steps: 3, optimizer: {beta: 2}}]", [], r"phases\[0\].optimizer has no key `beta`"),
        (
            "[{steps: 3, model: {attention: {bigbrid: {block: 2}}}}]",
            [],
            r"phases\[0\].model.attention has no key `bigbrid`; did you mean `bigbird`",
        ),
        ("[{steps: 3, model: 5}]", [], r"phases\[0\].model must be a mapping, got 5"),
        ("[{steps: -3}]", [], r"phases\[0\].steps must be a whole number of at least 1, got -3"),
        ("[{steps: 1.5}]", [], r"phases\[0\].steps must be a whole number"),
        (
            "[{steps: 3, data: {length: long}}]",
            [],
            r"phases\[0\].data.length must be a whole number, got 'long'",
        ),
        ("[{steps: 3, data: {length: 24}}]", [], r"multiple of phases\[0\].data.length = 24"),
        (
            "[{steps: 3, trainer: {gradient_clip: 0}}]",
            [],
            r"phases\[0\].trainer.gradient_clip must be positive or null, got 0",
        ),
        ("[{steps: 3}]", ["trainer.max_steps=4"], "3 steps, got trainer.max_steps=4"),
        ("[{steps: 3}]", ["trainer.max_minutes=5"], "trainer.max_minutes=5; set both to null"),
    ],
)
def test_a_mistake_in_the_phases_is_one_sentence(phases, overrides, message):
    with pytest.raises(ValueError, match=message):
        read(phases, *overrides)


@pytest.mark.parametrize(
    ("key", "now"),
    [
        ("length: 64", "`data: {length: ...}`"),
        ("batch_tokens: 64", "`data: {batch_tokens: ...}`"),
        ("micro_tokens: 64", "`data: {micro_tokens: ...}`"),
        ("lr: 0.1", "`optimizer: {lr: ...}`"),
        ("windows: [8]", "`model: {attention: {longformer: {window: [...]}}}`"),
    ],
)
def test_a_key_of_former_phases_says_what_to_write_instead(key, now):
    with pytest.raises(ValueError, match=rf"phases\[0\].\w+ is written as {re.escape(now)}"):
        read(f"[{{steps: 3, {key}}}]")


def check(phases, *overrides):
    found, config = read(phases, *SMALL, "data=sample", "run_id=x", *overrides)
    model = instantiate(config.model)
    check_phases(found, model)
    return model


def test_the_settings_of_every_phase_are_tried_before_training():
    model = Windowed(0.3, [0, 0])
    check_phases(phases(), model)
    assert model.windows == [1, 2]
    with pytest.raises(ValueError, match=r"phases\[2\]: .*got \[1, 2, 3\]"):
        check_phases(phases({"phases.2.model.windows": [1, 2, 3]}), model)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("model: {dim: 64}", r"phases\[0\]: the weights of a model go on .* `embedding.weight`"),
        ("model: {block: {norm: layer}}", r"would be LayerNorm instead of RMSNorm"),
        ("model: {dropout: 2}", r"phases\[0\].model.dropout has moved; write model.block.dropout"),
        ("model: {stack: recompute}", r"phases\[0\].model.stack cannot change in a run"),
        ("trainer: {gradient_clip: true}", r"phases\[0\].trainer.gradient_clip .*, got True"),
        ("model: {block: {dropout: 2}}", r"phases\[0\]: .*dropout=2"),
        ("model: {block: {dropout: often}}", r"phases\[0\]: .*dropout must be a number, got"),
        ("optimizer: {lr: -1}", r"phases\[0\]: optimizer.lr must be at least 0 .*, got -1"),
        ("schedule: {decay: 2}", r"phases\[0\]: .*decay=2"),
    ],
)
def test_what_the_model_or_the_optimizer_cannot_be_is_refused_before_training(phase, message):
    with pytest.raises(ValueError, match=message):
        check(f"[{{steps: 3, {phase}}}]")


def test_a_phase_that_is_longer_than_the_learned_positions_is_refused():
    with pytest.raises(ValueError, match=r"phases\[1\]: learned positions reach 64 tokens"):
        check(
            "[{steps: 3}, {steps: 3, data: {length: 65, batch_tokens: 650}}]",
            "model.embedding.matrix_shape=[8, 8]",
        )


@torch.no_grad()
def test_a_model_with_adopted_settings_is_the_one_that_was_made_with_them():
    def model(*windows, dropout):
        window = f"model.attention.longformer.window=[{','.join(map(str, windows))}]"
        overrides = ["model=longformer", *SMALL, window, f"model.block.dropout={dropout}"]
        return instantiate(composed(*overrides).model)

    live, other = model(4, 8, dropout=0.5), model(16, 32, dropout=0.25)
    for parameter in live.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    other.load_state_dict(live.state_dict())
    kept = dict(live.named_parameters())
    with torch.device("meta"):
        settings = model(16, 32, dropout=0.25)
    adopt_settings(live, settings)
    assert all(parameter is kept[name] for name, parameter in live.named_parameters())
    tokens = torch.randint(256, (2, 64))
    for mode in (True, False):
        live.train(mode), other.train(mode)
        outputs = []
        for one in (live, other):
            torch.manual_seed(0)
            outputs.append(one(tokens))
        assert torch.equal(*outputs)


def test_train_and_eval_follow_the_phases(tmp_path):
    folder = tmp_path / "run"
    second = (
        "{steps: 2, data: {length: 128, micro_tokens: 256}, optimizer: {lr: 0.01}, "
        "model: {attention: {bigbird: {block: 16}}}}"
    )
    result = train(folder, f"phases=[{{steps: 3}}, {second}]", "schedule=constant")
    assert "phase 2 of 2: 2 steps after step 3" in result.stdout
    steps = curve(folder)
    assert [step for step, row in steps.items() if "val/bits_per_byte" in row] == [0, 3, 5]
    checkpoint, cache = folder / "checkpoints/last.ckpt", tmp_path / "cache"
    changes = {"attention": {"bigbird": {"block": 16}}}
    assert read_checkpoint(checkpoint)["phase"] == {"length": 128, "model": changes}
    settings = [f"checkpoint={checkpoint}", "limit=500", f"paths.cache={cache}"]
    evaluate(composed(*settings, name="eval"))
    assert json.loads((folder / "evaluation.json").read_text())["context"] == 128


def test_the_phase_of_a_former_checkpoint_is_read():
    assert of_phase({}) == (None, {})
    assert of_phase({"phase": {"length": 64, "windows": None}}) == (64, {})
    windows = {"attention": {"longformer": {"window": [1, 2]}}}
    assert of_phase({"phase": {"length": 64, "windows": [1, 2]}}) == (64, windows)
