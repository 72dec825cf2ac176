"""Where metrics go: always `metrics.jsonl`, and tensorboard or wandb beside it."""

import json
import math
import secrets
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.image import imread


def jsonl(output: str) -> list[Logger]:
    """`metrics.jsonl` in the run's folder ``output``, and nothing else."""
    return [MetricsFile(output)]


def tensorboard(output: str) -> list[Logger]:
    """`metrics.jsonl`, and event files in the folder `tensorboard` of the run."""
    return [*jsonl(output), TensorBoardLogger(output, name="", version="tensorboard")]


def wandb(
    output: str, project: str, entity: str | None, name: str | None, offline: bool
) -> list[Logger]:
    """`metrics.jsonl`, and a run of Weights & Biases that a resumed run continues.

    Args:
        output: the run's folder; holds `config.yaml`, which wandb shows, and keeps wandb's id.
        project: wandb project.
        entity: wandb user or team; None: the account's default.
        name: how wandb calls the run; None: like its folder.
        offline: write to the folder `wandb` of the run only; `wandb sync` uploads it later.

    Raises:
        ValueError: if wandb is not installed, not logged in, or cannot be reached.
    """
    if rank_zero_only.rank > 0:
        return jsonl(output)  # the first process logs for all
    folder = Path(output)
    try:
        import wandb as client
    except ModuleNotFoundError as error:
        raise ValueError("logger=wandb needs a package: `pip install wandb`.") from error
    client.finish()  # the run of a sweep's previous job, which `init` would return again
    try:
        run = client.init(
            project=project,
            entity=entity,
            name=name or folder.name,
            dir=output,
            mode="offline" if offline else "online",
            id=_wandb_id(folder),
            resume="allow",
            config=yaml.safe_load((folder / "config.yaml").read_text()),
            allow_val_change=True,  # such as the number of devices, when a run is resumed
        )
    except client.errors.Error as error:
        raise ValueError(
            f"wandb could not start ({str(error).splitlines()[0]}); log in with `wandb login`, "
            "or set `logger.offline=true` to write to the run's folder only."
        ) from error
    run.define_metric("trainer/global_step")  # Lightning's name for the step, our x axis
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return [*jsonl(output), WandbLogger(experiment=run)]


def log_picture(trainer: L.Trainer, name: str, path: Path) -> None:
    """Show a PNG file under ``name`` at the current step, in the loggers that show pictures."""
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, imread(path), step, dataformats="HWC")


class MetricsFile(Logger):
    """Appends to `metrics.jsonl`: one JSON object a line, with ``step`` and any metrics.

    A value that is not finite is written as null. No metric appears twice for a step, and steps
    never go back; a resumed run cuts the file with `rewind` and continues it.
    """

    def __init__(self, output: str):
        super().__init__()
        self.path = Path(output) / "metrics.jsonl"
        self._step, self._logged = -1, set()  # the last step in the file and its metrics
        if rank_zero_only.rank == 0 and self.path.exists():
            for line in self.path.read_text().splitlines():
                self._remember(**json.loads(line))

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run's folder holds `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if step < self._step:
            return  # when training ends, Lightning sends the latest metrics again
        known = self._logged if step == self._step else set()
        # Lightning adds the epoch, which never changes here: data have no end.
        fresh = {k: _finite(v) for k, v in metrics.items() if k not in known and k != "epoch"}
        if fresh:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **fresh}, allow_nan=False) + "\n")
            self._remember(step, **fresh)

    def _remember(self, step: int, **metrics: float | None) -> None:
        self._logged = set(metrics) | (self._logged if step == self._step else set())
        self._step = step


def rewind(path: Path, step: int) -> None:
    """Drop what `metrics.jsonl` holds beyond ``step``, and a last line that was cut off.

    A run that is killed has logged more steps than it has saved; it will log those again.
    """
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _wandb_id(folder: Path) -> str:
    """The id of this folder's run, drawn once: a resumed run continues its curves."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()
