"""What a run of images looks like: pictures that the model draws and completes."""

import logging
import math
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from evaluation.generation import check_sampling
from evaluation.images import check_share, complete, draw
from training.loggers import log_picture
from training.progress import Budget

NUMBER = 4  # of images where none is configured; on a CPU that would take minutes

log = logging.getLogger("strider")


class Images(L.Callback):
    """Writes `samples/step-N.png` and `samples/step-N-completions.png`; loggers show both.

    Does nothing where the data are not images, or the model predicts masked tokens. Like `Samples`
    it draws while a validation begins, with random numbers of its own. An image has thousands of
    bytes, drawn one after the other, so by default that is only the validation after the last step.

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
        shape = trainer.datamodule.image_shape
        if shape is None or not task.objective.causal:
            return
        if not (self.every_validation or Budget.of(trainer).spent):
            return
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
