"""What a run of images looks like: pictures that the model draws and completes."""

import copy
import logging
import math
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from evaluation.generation import check_sampling
from evaluation.images import check_share, complete, draw
from training.run.loggers import log_picture
from training.run.progress import Budget

NUMBER = 4  # of images where none is configured; on a CPU that would take minutes

log = logging.getLogger("strider")


class Images(L.Callback):
    """Writes `samples/step-N.png` and `samples/step-N-completions.png`; loggers show both.

    Does nothing where the data are not images, or the model predicts masked tokens. It draws with
    the weights that a validation has scored (averages, where there are any), after `Checkpoints`
    has saved them (the trainer puts this callback last), and with random numbers of its own. An
    image has thousands of bytes, each of which costs a step of the model, so by default that is
    only after the last step.

    Args:
        output: the run's folder.
        samples: images to draw from nothing, 0 for none; None: 4, none on a CPU.
        completions: images of validation to complete, the first ones, 0 for none; None: 4, none on
            a CPU.
        given: share of the rows of each that the model sees.
        every_validation: also before the last step.
        temperature: divides the logits; 0 takes the most likely byte.
        top_k: draws from so many most likely bytes; None: from all.
        top_p: draws from the most likely bytes that together have this probability.

    Raises:
        ValueError: if a number is negative, or a share or probability impossible.
    """

    def __init__(
        self,
        output: str,
        samples: int | None,
        completions: int | None,
        given: float,
        every_validation: bool,
        temperature: float,
        top_k: int | None,
        top_p: float,
    ):
        if min(samples or 0, completions or 0) < 0:
            raise ValueError(
                f"callbacks.images draws 0 or more images, got samples={samples} and "
                f"completions={completions}."
            )
        check_share(given)
        check_sampling(temperature, top_k, top_p)
        self.folder = Path(output) / "samples"
        self.samples, self.completions, self.given = samples, completions, given
        self.every_validation = every_validation
        self.sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    @rank_zero_only
    def on_validation_epoch_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        shape, averaged = trainer.datamodule.image_shape, _averages(trainer)
        last = self.every_validation or Budget.of(trainer).spent
        self._due = shape is not None and task.objective.causal and last
        self._scored = _copied(task.model) if self._due and averaged else None

    @rank_zero_only
    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if not self._due:
            return
        trained = None if self._scored is None else _copied(task.model)
        if trained is not None:
            task.model.load_state_dict(self._scored)
        self._draw(trainer, task)
        if trained is not None:
            task.model.load_state_dict(trained)
        self._scored = None

    def _draw(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        shape = trainer.datamodule.image_shape
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{trainer.global_step}"
        sampling = {**self.sampling, "generator": torch.Generator().manual_seed(0)}
        default = 0 if task.device.type == "cpu" else NUMBER
        samples = default if self.samples is None else self.samples
        completions = default if self.completions is None else self.completions
        if samples or completions:
            log.info("drawing images to %s, byte by byte", self.folder)
        with trainer.precision_plugin.forward_context():
            if samples:
                path = self.folder / f"{name}.png"
                draw(task.model, samples, shape, path, **sampling)
                log_picture(trainer, "samples", path)
            if completions:
                path = self.folder / f"{name}-completions.png"
                tokens = trainer.datamodule.split("validation").tokens
                originals = tokens[: completions * math.prod(shape)]
                originals = originals.reshape(-1, math.prod(shape))
                complete(task.model, originals, shape, self.given, path, **sampling)
                log_picture(trainer, "completions", path)


def _averages(trainer: L.Trainer) -> bool:
    """Whether validation scores other weights than those that are trained."""
    return any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)


def _copied(model: nn.Module) -> dict:
    return copy.deepcopy(model.state_dict())
