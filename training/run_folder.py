"""The folder of a run: its name, what makes it explain itself, and where a run continues."""

import hashlib
import json
import logging
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from training.checkpoint import read_checkpoint
from training.loggers import rewind

log = logging.getLogger("strider")

# How a run is launched, watched or continued does not make it another run.
NOT_IN_ID = {
    "": ["paths", "logger", "resume", "run_id"],
    "trainer": ["devices", "nodes", "strategy"],
}


def prepare(config: DictConfig) -> Path | None:
    """Make the run's folder ready, and find where the run continues.

    Fills in ``config.run_id``; then `config.yaml`, `metrics.jsonl` and `train.log` are in the
    folder ``config.paths.output``. Only the first process writes.

    Args:
        config: the composed configuration. ``resume`` is ``"auto"`` (continue the folder's last
            checkpoint if there is one), the path of a checkpoint, or None (start afresh; a run
            that is already in the folder is moved beside it).

    Returns:
        The checkpoint to continue from, or None for a fresh start.

    Raises:
        FileNotFoundError, ValueError: if that checkpoint is missing, unreadable, or of another
            model.
    """
    if config.run_id is None:
        config.run_id = run_id(config)
    folder = Path(config.paths.output)
    last = folder / "checkpoints" / "last.ckpt"
    if config.resume == "auto":
        checkpoint = last if last.exists() else None
    else:
        checkpoint = None if config.resume is None else Path(config.resume)
    step = -1 if checkpoint is None else _step_of(checkpoint, config)
    if rank_zero_only.rank == 0:
        if config.resume is None and (folder / "config.yaml").exists():
            _move_aside(folder)
        _write(folder, config, step)
        if checkpoint is not None:
            log.info("continuing %s after step %d", checkpoint, step)
    return checkpoint


def run_id(config: DictConfig) -> str:
    """``<attentions>-<corpus>-<8 hex digits>``: the same for the same experiment, wherever it runs.

    The digits are those of a SHA-256 of the resolved configuration without paths, devices, logger
    and resume, so all processes agree on the name, and a job that is queued again finds its run.
    """
    config = OmegaConf.create(OmegaConf.to_container(config))
    config.run_id = ""
    config.paths = {name: name for name in config.paths}  # wherever else a path is referred to
    plain = OmegaConf.to_container(config, resolve=True)
    for section, keys in NOT_IN_ID.items():
        for key in keys:
            (plain[section] if section else plain).pop(key, None)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    model = "-".join(dict.fromkeys(plain["model"]["layout"]))
    return f"{model}-{plain['data']['name']}-{digest[:8]}"


def _step_of(checkpoint: Path, config: DictConfig) -> int:
    """The optimizer step at which a checkpoint was written, if it fits the configured model."""
    saved = read_checkpoint(checkpoint)
    old = yaml.safe_load(saved["config"])["model"]
    new = OmegaConf.to_container(config.model, resolve=True)
    if difference := _first_difference(old, new, "model"):
        key, before, now = difference
        raise ValueError(
            f"the run in {checkpoint} has {key}={before}, this one has {key}={now}; "
            "set it back, or set `resume=null` to start afresh."
        )
    return saved["global_step"]


def _first_difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (key, old, new)
    for name in old | new:
        found = _first_difference(old.get(name), new.get(name), f"{key}.{name}")
        if found:
            return found
    return None


def _move_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    log.info("the run that was in %s is now in %s", folder, aside)


def _write(folder: Path, config: DictConfig, step: int) -> None:
    """Write what identifies the run, and cut its metrics to those up to ``step``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    metrics = folder / "metrics.jsonl"
    metrics.touch()
    rewind(metrics, step)

    _open_log(folder / "train.log")


def _open_log(path: Path) -> None:
    """Send what the console shows to a file as well, below how the run was called."""
    for old in [h for h in log.handlers if isinstance(h, logging.FileHandler)]:
        log.removeHandler(old)  # of the run before, in a sweep
        old.close()
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    head = f"{shlex.join(sys.argv)}\n{_commit()}, {_versions()}, host {platform.node()}"
    # Only for the file: what the user typed is no news on the console.
    handler.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, head, (), None))


def _versions() -> str:
    packages = ["torch", "lightning", "triton"]
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
    )


def _commit() -> str:
    """The commit of the code that runs, marked if files were changed since."""
    root = Path(__file__).parents[1]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "code that is not in git"
    return f"commit {result.stdout.strip()}"
