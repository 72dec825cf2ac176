"""Running train.py and eval.py as a user does, on a model that is small enough for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = [
    "data=sample", "data.length=64", "data.batch_tokens=512", "data.validation_tokens=1000",
    "data.workers=0", "model.dim=32", "model.heads=2", "model.layers=2", "trainer=cpu",
    "trainer.log_every=1", "trainer.validate_every=null", "callbacks.samples.tokens=4",
    "schedule.warmup_steps=2",
]  # fmt: skip

# All of a validation split of 1,039 bytes is scored in training.
WHOLE = ["data.corpus.fractions=[0.94975, 0.00025, 0.05]", "data.validation_tokens=2000"]


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, script, *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """One thread, no GPU unless asked for, and none of the variables of a surrounding job."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "WANDB"))}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"} | more


def run(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(script, *arguments), cwd=ROOT, env=environment(**more), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def train(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    result = run("train.py", *TINY, *place(folder), *arguments, **more)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def place(folder: Path) -> list[str]:
    return [f"paths.output={folder}", f"paths.cache={folder.parent / 'cache'}"]


def curve(folder: Path) -> dict[int, dict[str, float]]:
    """`metrics.jsonl` by step, without what depends on the machine's speed."""
    steps: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        kept = {k: v for k, v in metrics.items() if k.startswith(("train/", "val/"))}
        steps.setdefault(metrics["step"], {}).update(kept)
    return steps
