"""The README's commands run, and its map is the repository."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize

from tests.support.commands import ROOT, TINY, run

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S)
    for line in block.splitlines()
    if line.strip()
]
PYTHON = [command[1:] for command in COMMANDS if command[0] == "python" and command[1] != "-m"]
MODULES = [command[2] for command in COMMANDS if command[:2] == ["python", "-m"]]


def test_there_are_commands():
    assert len(PYTHON) >= 5
    assert ["make", "train"] in COMMANDS


@pytest.mark.parametrize("command", PYTHON, ids=" ".join)
def test_each_command_composes(command):
    script, *overrides = command
    with initialize(version_base="1.3", config_path="../conf"):
        compose(Path(script).stem, overrides=overrides)


@pytest.mark.parametrize("module", MODULES)
def test_each_measurement_explains_itself(module):
    result = run("-m", module, "--help")
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_the_quick_start_trains_with_wandb_offline_and_is_evaluated(tmp_path):
    command = next(c for c in PYTHON if "experiment=quickstart" in c and "logger=wandb" in c)
    small = [a for a in TINY if not a.startswith("data=")]
    folder = tmp_path / "run"
    paths = [f"paths.output={folder}", f"paths.cache={tmp_path / 'cache'}"]
    result = run(*command, *small, *paths, "trainer.max_steps=2")
    assert result.returncode == 0, result.stderr
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    script, _, prompt = next(c for c in PYTHON if c[0] == "eval.py")
    checkpoint = f"checkpoint={folder}/checkpoints/best.ckpt"
    short = ["limit=200", "sample_tokens=4", paths[1]]
    result = run(script, checkpoint, prompt, *short)
    assert result.returncode == 0, result.stderr
    assert "The history of" in result.stdout


def test_the_map_shows_every_package():
    for path in ROOT.iterdir():
        if (path / "__init__.py").exists() or path.name == "conf":
            assert f"`{path.name}/`" in TEXT, path
