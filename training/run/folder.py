"""The folder of a run: its name, what makes it explain itself, and where a run continues."""

import fcntl
import hashlib
import json
import logging
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from training.run.checkpoint import parse_config, read_checkpoint
from training.run.loggers import rewind

log = logging.getLogger("strider")

# How a run is launched, watched or continued does not make it another run.
NOT_IN_ID = {
    "": ["paths", "logger", "resume", "run_id"],
    "trainer": ["accelerator", "devices", "nodes", "strategy", "log_every", "compile"],
    "data": ["workers"],
}

# What makes the second half of a run another experiment than the first, and what of it does not.
MUST_AGREE = ["model", "data", "optimizer", "schedule", "phases", "seed"]
MAY_DIFFER = {
    "data": ["path", "cache", "workers", "micro_tokens", "validation_tokens", "exclude_rows"],
}

_held: list[IO] = []  # the lock of the folder that this process trains in


def choose_checkpoint(config: DictConfig) -> Path | None:
    """Find where the run continues; fills in ``config.run_id`` and changes nothing on the disk.

    Args:
        config: the composed configuration. ``resume`` is ``"auto"`` (continue the folder's last
            checkpoint if there is one), the path of a checkpoint, or None (start afresh).

    Returns:
        The checkpoint to continue from, or None for a fresh start.

    Raises:
        FileNotFoundError, ValueError: if that checkpoint is missing, unreadable, or of a run with
            other settings.
    """
    if config.run_id in (None, ""):
        config.run_id = run_id(config)
    last = Path(config.paths.output) / "checkpoints" / "last.ckpt"
    if config.resume == "auto":
        checkpoint = last if last.exists() else None
    else:
        checkpoint = None if config.resume is None else Path(str(config.resume))
    if checkpoint is not None:
        _require_same_settings(checkpoint, config)
        _require_steps_ahead(checkpoint, config.trainer.max_steps)
    return checkpoint


def open_folder(config: DictConfig, checkpoint: Path | None) -> None:
    """Make the run's folder ready: `config.yaml`, `metrics.jsonl` and `train.log` are in it.

    Only the first process writes. Metrics beyond the step of ``checkpoint`` are dropped, and with
    ``resume=null`` a run that is already in the folder is moved beside it.

    Raises:
        ValueError: if another process is training in the folder, or it cannot be written.
    """
    if rank_zero_only.rank != 0:
        return
    folder = Path(config.paths.output)
    try:
        if config.resume is None and (folder / "config.yaml").exists():
            _lock(folder)
            _move_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        step = -1 if checkpoint is None else read_checkpoint(checkpoint)["global_step"]
        _write(folder, config, step)
    except OSError as error:
        raise ValueError(
            f"the run's folder {folder} cannot be written ({error.strerror}); set paths.output to "
            "a folder that can."
        ) from error
    if checkpoint is not None:
        log.info("continuing %s after step %d", checkpoint, step)


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


def _require_same_settings(checkpoint: Path, config: DictConfig) -> None:
    """A checkpoint needs its model; a folder that is continued by itself needs all that counts."""
    saved = parse_config(read_checkpoint(checkpoint)["config"])
    now = OmegaConf.to_container(config, resolve=True)
    averaged = ["ema" in (c.get("callbacks") or {}) for c in (saved, now)]
    if averaged[0] != averaged[1]:
        raise ValueError(
            f"the run in {checkpoint} was made {'with' if averaged[0] else 'without'} "
            "callbacks=ema, whose checkpoints hold other weights; set it as it was, or set "
            "`resume=null`."
        )
    for section in MUST_AGREE if config.resume == "auto" else ["model"]:
        old, new = (_without_details(c.get(section), section) for c in (saved, now))
        if difference := _first_difference(old, new, section):
            key, before, after = difference
            raise ValueError(
                f"the run in {checkpoint} has {key}={before}, this one has {key}={after}; set it "
                "back, or set `resume=null` to start afresh, or another `paths.output`."
            )


def _require_steps_ahead(checkpoint: Path, max_steps: int | None) -> None:
    done = read_checkpoint(checkpoint)["global_step"]
    if max_steps is not None and done > max_steps:
        raise ValueError(
            f"the checkpoint {checkpoint} has {done:,} steps behind it, and the run ends after "
            f"{max_steps:,}; raise trainer.max_steps, or add to phases."
        )


def _without_details(section: Any, name: str) -> Any:
    if isinstance(section, list):  # phases, which have sections of their own
        return [{k: _without_details(v, k) for k, v in phase.items()} for phase in section]
    ignored = MAY_DIFFER.get(name, [])
    if not isinstance(section, dict):
        return section
    return {k: v for k, v in section.items() if k not in ignored}


def _first_difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (key, old, new)
    for name in old | new:
        found = _first_difference(old.get(name), new.get(name), f"{key}.{name}")
        if found:
            return found
    return None


def _lock(folder: Path) -> None:
    """Keep other processes out of a folder until this one ends or opens another."""
    for file in _held:
        file.close()
    _held[:] = [open(folder / ".lock", "w")]  # noqa: SIM115 (held on purpose)
    try:
        fcntl.flock(_held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"another process is training in {folder}; wait for it, or set another paths.output."
        ) from error


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
    root = Path(__file__).parents[2]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "code that is not in git"
    return f"commit {result.stdout.strip()}"
