"""What a run looks like: generated text at each validation, attention patterns once."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.image import imread

from evaluation.gallery import draw_patterns
from evaluation.generation import generate


class Samples(L.Callback):
    """Writes `samples/step-N.txt` and `samples/attention.png`; wandb and tensorboard show both.

    The text is drawn while a validation begins: the model is in evaluation mode by then, and has
    the averaged weights where weights are averaged (if that callback is listed before this one).
    It uses random numbers of its own, the same ones at every step, so that texts compare.

    Args:
        output: the run's folder.
        length: tokens of a sequence, for the picture.
        prompt: how every text begins; may be empty.
        tokens: bytes to generate; each costs a pass over what came before it.
        temperature: divides the logits; 0 takes the most likely byte.
        top_p: draws from the most likely bytes that together have this probability.
    """

    def __init__(
        self,
        output: str,
        length: int,
        prompt: str,
        tokens: int,
        temperature: float,
        top_p: float,
    ):
        self.folder = Path(output) / "samples"
        self.length = length
        self.prompt = prompt
        self.tokens = tokens
        self.sampling = {"temperature": temperature, "top_p": top_p}

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = draw_patterns(task.model.patterns(), self.length, self.folder / "attention.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("attention", [str(path)], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                picture, step = imread(path), trainer.global_step
                logger.experiment.add_image("attention", picture, step, dataformats="HWC")

    @rank_zero_only
    def on_validation_epoch_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        prompt = torch.tensor([list(self.prompt.encode())], dtype=torch.long, device=task.device)
        with trainer.precision_plugin.forward_context():
            tokens = generate(
                task.model,
                prompt,
                self.tokens,
                context=self.length,
                generator=torch.Generator().manual_seed(0),
                **self.sampling,
            )
        text = bytes(tokens[0].tolist()).decode(errors="replace")
        step = trainer.global_step
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"step-{step}.txt").write_text(text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_text("sample", columns=["step", "text"], data=[[step, text]], step=step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", text, step)
