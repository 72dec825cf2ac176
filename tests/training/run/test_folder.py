"""A run's folder: named by its experiment, explains itself, and loses nothing."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from training.run.checkpoint import AtomicCheckpointIO
from training.run.folder import choose_checkpoint, open_folder, run_id


@pytest.fixture
def make_config(tmp_path):
    def make(**changes):
        config = OmegaConf.create(
            {
                "seed": 1,
                "resume": "auto",
                "run_id": None,
                "paths": {"output": f"{tmp_path}/runs/${{run_id}}", "cache": "/cache"},
                "model": {"dim": 8, "layout": ["window", "bigbird", "window"], "vocab": 256},
                "data": {"name": "text", "length": 16, "cache": "${paths.cache}"},
                "optimizer": {"lr": 0.1},
                "schedule": {"decay": 0.3},
                "phases": [{"steps": 3}, {"steps": 2, "data": {"micro_tokens": 16}}],
                "trainer": {"devices": 1, "nodes": 1, "strategy": "auto", "max_steps": 5},
                "logger": {"offline": False, "output": "${paths.output}"},
                "callbacks": {"checkpoints": {"output": "${paths.output}"}},
            }
        )
        for key, value in changes.items():
            OmegaConf.update(config, key.replace("__", "."), value)
        return config

    return make


def prepare(config):
    checkpoint = choose_checkpoint(config)
    open_folder(config, checkpoint)
    return checkpoint


def save_last(config, step=2):
    """What a run leaves behind when it stops after ``step`` steps."""
    folder = Path(config.paths.output)
    checkpoint = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {"w": torch.zeros(1)},
        "global_step": step,
        "config": (folder / "config.yaml").read_text(),
    }
    path = folder / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(5)))
    return path


def test_the_id_names_model_and_data_and_is_the_same_wherever_the_run_is_made(make_config):
    name = run_id(make_config())
    assert name.startswith("window-bigbird-text-")
    for change in (
        {"paths__output": "/elsewhere"},
        {"paths__cache": "/other"},
        {"trainer__devices": 8, "trainer__nodes": 2, "trainer__strategy": "ddp"},
        {"logger__offline": True},
        {"resume": None},
        {"run_id": "mine"},
    ):
        assert run_id(make_config(**change)) == name, change
    for change in ({"seed": 2}, {"model__dim": 16}, {"data__length": 32}):
        assert run_id(make_config(**change)) != name, change


def test_an_empty_id_is_none(make_config):
    config = make_config(run_id="")
    choose_checkpoint(config)
    assert config.run_id == run_id(make_config())


def test_a_fresh_folder_explains_itself(make_config):
    config = make_config()
    assert prepare(config) is None
    logging.getLogger("strider").info("step 1")
    folder = Path(config.paths.output)
    assert folder.name == config.run_id == run_id(make_config())
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["callbacks"]["checkpoints"]["output"] == str(folder)
    text = (folder / "train.log").read_text()
    for part in (sys.argv[0], "Python 3.", f"torch {torch.__version__.split('+')[0]}", "step 1"):
        assert part in text
    assert (folder / "metrics.jsonl").read_text() == ""


def test_auto_continues_from_last_and_keeps_metrics_up_to_its_step(make_config):
    prepare(make_config())
    config = make_config(run_id=run_id(make_config()))
    path = save_last(config)
    assert prepare(config) == path
    rows = (path.parents[1] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2]


def test_a_path_is_continued_and_must_exist(make_config, tmp_path):
    config = make_config()
    prepare(config)
    path = save_last(config)
    assert prepare(make_config(run_id="other", resume=str(path))) == path
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nowhere.ckpt; give the path"):
        prepare(make_config(resume=str(tmp_path / "nowhere.ckpt")))


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(make_config):
    config = make_config()
    prepare(config)
    path = save_last(config, step=6)
    with pytest.raises(ValueError, match="has 6 steps behind it, and the run ends after 5"):
        choose_checkpoint(make_config(run_id="other", resume=str(path)))


def test_null_starts_afresh_and_moves_the_old_run_beside(make_config):
    config = make_config(resume=None)
    for _ in range(3):
        assert prepare(config) is None
        save_last(config)
    folder = Path(config.paths.output)
    for old in (f"{folder}.1", f"{folder}.2", folder):
        assert (Path(old) / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"model__dim": 16}, "has model.dim=8, this one has model.dim=16"),
        ({"model__layout": ["bigbird"]}, r"model.layout=\['window', 'bigbird', 'window'\]"),
        ({"model__new": 3}, "has model.new=None, this one has model.new=3"),
    ],
)
def test_another_model_in_the_folder_is_named_by_its_first_difference(
    make_config, change, difference
):
    config = make_config(run_id="mine")
    prepare(config)
    path = save_last(config)
    before = {p: p.read_bytes() for p in path.parents[1].rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=difference):
        prepare(make_config(run_id="mine", **change))
    assert {p: p.read_bytes() for p in before} == before


def test_the_budget_may_change_on_a_resume(make_config):
    config = make_config(run_id="mine")
    prepare(config)
    path = save_last(config)
    assert prepare(make_config(run_id="mine", trainer__max_steps=50)) == path
    assert yaml.safe_load((path.parents[1] / "config.yaml").read_text())["trainer"] == {
        "devices": 1, "nodes": 1, "strategy": "auto", "max_steps": 50,
    }  # fmt: skip


def test_a_phase_may_be_continued_in_other_micro_batches(make_config):
    config = make_config(run_id="mine")
    prepare(config)
    path = save_last(config)
    phases = [{"steps": 3}, {"steps": 2, "data": {"micro_tokens": 32}}]
    assert prepare(make_config(run_id="mine", phases=phases)) == path


def test_the_log_of_one_run_does_not_go_on_in_the_next(make_config):
    first, second = make_config(run_id="first"), make_config(run_id="second")
    for config in (first, second):
        prepare(config)
    logging.getLogger("strider").info("a line of the second")
    assert "a line" not in Path(first.paths.output, "train.log").read_text()
    assert "a line" in Path(second.paths.output, "train.log").read_text()


def test_only_the_first_process_writes(make_config, tmp_path):
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(make_config()))
    command = (
        "import sys; from omegaconf import OmegaConf; from training.run import folder; "
        "config = OmegaConf.load(sys.argv[1]); "
        "folder.open_folder(config, folder.choose_checkpoint(config)); "
        "print(config.run_id)"
    )
    result = subprocess.run(
        [sys.executable, "-c", command, tmp_path / "config.yaml"],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"RANK": "1", "LOCAL_RANK": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == run_id(make_config())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"optimizer__lr": 0.2},
        {"data__length": 32},
        {"phases": [{"steps": 3}, {"steps": 4, "data": {"micro_tokens": 16}}]},
    ],
)
def test_a_folder_is_not_continued_as_another_experiment(make_config, change):
    config = make_config(run_id="mine")
    prepare(config)
    path = save_last(config)
    with pytest.raises(ValueError, match="set it back"):
        choose_checkpoint(make_config(run_id="mine", **change))
    # Who names the checkpoint means it: a run may go on from it under other settings.
    assert choose_checkpoint(make_config(run_id="other", resume=str(path), **change)) == path


def test_choosing_a_checkpoint_changes_nothing_on_the_disk(make_config, tmp_path):
    choose_checkpoint(make_config())
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_train_in_one_folder(make_config):
    config = make_config(run_id="mine")
    prepare(config)
    code = f"import fcntl; fcntl.flock(open({config.paths.output + '/.lock'!r}), 6)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "BlockingIOError" in other.stderr  # held until this process ends
    with open(config.paths.output + "/.lock") as lock:
        import fcntl

        prepare(make_config(run_id="elsewhere"))  # lets go of the first folder
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match="another process is training"):
            prepare(make_config(run_id="mine"))


def test_a_folder_that_cannot_be_written_is_one_sentence(make_config, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written .* paths.output"):
        prepare(make_config(run_id="mine"))
