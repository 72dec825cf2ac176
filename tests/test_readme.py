"""The README is short, its commands run, and its map is the repository."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize

from tests.support.commands import ROOT, TINY, run


def commands(text: str) -> list[list[str]]:
    """The lines of all blocks of shell commands, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


TEXT = (ROOT / "README.md").read_text()
COMMANDS = commands(TEXT)
PYTHON = [command[1:] for command in COMMANDS if command[0] == "python"]
MODULES = [command[2] for command in commands((ROOT / "bench" / "README.md").read_text())]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md"))]


def test_it_is_short():
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_there_are_commands():
    assert len(PYTHON) >= 5
    assert ["make", "train"] in COMMANDS
    assert len(MODULES) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_each_target_that_the_readme_names_is_in_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {command[1] for command in COMMANDS if command[0] == "make"} <= targets


def test_its_python_runs():
    code = re.search(r"```python\n(import torch.*?)```", TEXT, flags=re.S).group(1)
    assert "4096" in code  # shorter here, on a CPU
    found = {}
    exec(code.replace("4096", "64"), found)
    assert found["out"].shape == (1, 8, 64, 64)


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


@pytest.mark.slow
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
