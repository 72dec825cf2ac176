"""Loggers: one consistent metrics.jsonl; wandb and tensorboard show curves, text and pictures."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize
from hydra.utils import instantiate
from matplotlib.image import imread

from tests.support import wandb_offline
from tests.support.tiny import Recorder, TinyData, tiny_task, tiny_trainer
from training.callbacks.samples import Samples
from training.run.loggers import MetricsFile, rewind

CONFIG = {"seed": 3, "model": {"dim": 32, "layout": ["bigbird"]}}


@pytest.fixture
def output(tmp_path):
    output = tmp_path / "dense-text-0123abcd"
    output.mkdir()
    (output / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return output


def lines(output):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (output / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_metrics_are_one_json_object_a_line_with_their_step(output):
    train(output, "jsonl")
    rows = lines(output)
    assert [row["step"] for row in rows if "val/bits_per_byte" in row] == [0, 2]
    assert [row["step"] for row in rows if "train/loss_nats" in row] == [1, 2]
    assert "epoch" not in rows[1]


def test_values_that_are_not_finite_become_null(output):
    MetricsFile(output).log_metrics({"a": math.nan, "b": math.inf, "c": 1.5}, step=1)
    assert lines(output) == [{"step": 1, "a": None, "b": None, "c": 1.5}]


def test_no_metric_appears_twice_for_a_step_and_steps_never_go_back(output):
    metrics = MetricsFile(output)
    metrics.log_metrics({"a": 1.0}, step=1)
    metrics.log_metrics({"a": 2.0, "b": 2.0, "epoch": 0}, step=1)
    metrics.log_metrics({"a": 3.0}, step=2)
    metrics.log_metrics({"c": 4.0}, step=1)
    expected = [{"step": 1, "a": 1.0}, {"step": 1, "b": 2.0}, {"step": 2, "a": 3.0}]
    assert lines(output) == expected
    MetricsFile(output).log_metrics({"a": 5.0}, step=2)
    assert lines(output) == expected


def test_after_a_kill_the_file_is_cut_to_the_saved_step_and_goes_on(output):
    metrics = MetricsFile(output)
    for step in range(1, 6):
        metrics.log_metrics({"a": float(step)}, step)
    path = output / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "a')
    rewind(path, 3)
    metrics = MetricsFile(output)
    for step in range(4, 6):
        metrics.log_metrics({"a": float(step)}, step)
    assert lines(output) == [{"step": step, "a": float(step)} for step in range(1, 6)]


def train(output, logger, *overrides):
    """Train a small BigBird for two steps with the logger and the samples of the yaml files."""
    groups = ["model=bigbird", "data=sample", "paths=default", "callbacks=default"]
    sizes = ["model.dim=32", "model.heads=2", "model.layers=1", "callbacks.samples.tokens=8"]
    with initialize(version_base="1.3", config_path="../../../conf"):
        config = compose(
            overrides=[
                *(f"+{group}" for group in [*groups, f"logger={logger}", "seed=1", "run_id=x"]),
                *(f"paths.output={output}", *sizes, *overrides),
            ]
        )
    task = tiny_task()
    task.model = instantiate(config.model)
    callbacks = [instantiate(config.callbacks.samples)]
    trainer = tiny_trainer(output, Recorder(), callbacks=callbacks, max_steps=2)
    trainer.loggers = instantiate(config.logger)
    trainer.fit(task, datamodule=TinyData())
    return task


def run_train(output, *arguments, then="", **environment):
    """`train` in another process, because wandb holds one run a process."""
    call = f"train{(str(output), *arguments)}"
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"from tests.training.run.test_loggers import train; {call}; {then}",
        ],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_samples_and_the_pattern_are_files_whatever_the_logger(output):
    train(output, "jsonl", "callbacks.samples.prompt=16")  # a number, as yaml reads it
    names = {path.name for path in (output / "samples").iterdir()}
    assert names == {"attention.png", "step-0.txt", "step-2.txt"}
    assert (output / "samples" / "step-2.txt").read_text().startswith("16")
    assert imread(output / "samples" / "attention.png").std() > 0


def test_sampling_changes_nothing_in_training(output, monkeypatch):
    def weights():
        torch.manual_seed(0)
        return train(output, "jsonl").state_dict()

    with_samples = weights()
    monkeypatch.delattr(Samples, "on_validation_epoch_start")
    torch.testing.assert_close(weights(), with_samples, rtol=0, atol=0)


needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is an optional package")


@pytest.mark.slow
@needs_wandb
def test_wandb_shows_config_curves_text_and_picture_and_keeps_its_id_after_a_resume(output):
    for _ in range(2):
        result = run_train(output, "wandb", "logger.offline=true")
        assert result.returncode == 0, result.stderr
    first, second = wandb_offline.runs(output)
    assert wandb_offline.run_id(first) == wandb_offline.run_id(second)
    config = wandb_offline.config(first)
    assert {key: config[key] for key in CONFIG} == CONFIG

    rows = wandb_offline.history(first)
    assert [r["trainer/global_step"] for r in rows if "train/bits_per_byte" in r] == [1, 2]
    assert [r["trainer/global_step"] for r in rows if "val/bits_per_byte" in r] == [0, 2]
    sample = [row["sample"] for row in rows if "sample" in row][-1]
    table = json.loads(wandb_offline.media(first, sample).read_text())
    text = (output / "samples" / "step-2.txt").read_text()
    assert (table["columns"], table["data"]) == (["step", "text"], [[2, text]])
    picture = next(row["attention"] for row in rows if "attention" in row)
    drawn = output / "samples" / "attention.png"
    assert (imread(wandb_offline.media(first, picture)) == imread(drawn)).all()
    assert lines(output)  # beside wandb, not instead


@needs_wandb
def test_wandb_online_without_a_login_is_one_sentence(output):
    result = run_train(output, "wandb", WANDB_API_KEY="", HOME=str(output))
    assert "ValueError: wandb could not start" in result.stderr
    assert "`wandb login`, or set `logger.offline=true`" in result.stderr


def test_tensorboard_shows_curves_text_and_picture(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(output, "tensorboard")
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("val/bits_per_byte")] == [0, 2]
    assert events.Tags()["images"] == ["attention"]
    assert "sample/text_summary" in events.Tags()["tensors"]


def test_nothing_imports_wandb_or_tensorboard_unless_asked(output):
    result = run_train(
        output, "jsonl", then="import sys; print({'wandb', 'tensorboard'} & set(sys.modules))"
    )
    assert result.stdout == "set()\n", result.stderr
