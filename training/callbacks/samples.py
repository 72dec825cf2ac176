"""What a run looks like: generated text at each validation, attention patterns once."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from evaluation.gallery import draw_layers
from evaluation.generation import check_sampling, generate
from training.run.loggers import log_picture


class Samples(L.Callback):
    """Writes `samples/step-N.txt` and `samples/attention.png`; wandb and tensorboard show both.

    Only models of the next token write text.

    The text is drawn while a validation begins: the model is in evaluation mode by then, and has
    the averaged weights where weights are averaged (the trainer has that callback come first).
    It uses random numbers of its own, the same ones at every step, so that texts compare.

    Args:
        output: the run's folder.
        prompt: how every text begins; may be empty.
        tokens: how many to generate.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draws from so many most likely tokens; None: from all.
        top_p: draws from the most likely tokens that together have this probability.

    Raises:
        ValueError: if a number is negative, or a probability impossible.
    """

    def __init__(
        self,
        output: str,
        prompt: str,
        tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float,
    ):
        if tokens < 0:
            raise ValueError(f"callbacks.samples.tokens must be at least 0, got {tokens}.")
        check_sampling(temperature, top_k, top_p)
        self.folder = Path(output) / "samples"
        self.prompt = str(prompt)  # `16`, say, is read as a number
        self.tokens = tokens
        self.sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        length = trainer.datamodule.length
        path = draw_layers(task.model, length, self.folder / "attention.png")
        log_picture(trainer, "attention", path)

    @rank_zero_only
    def on_validation_epoch_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        vocabulary = trainer.datamodule.vocabulary
        if vocabulary is None or not task.objective.causal:
            return
        prompt = torch.tensor(vocabulary.encode(self.prompt)[None].astype("int64"))
        with trainer.precision_plugin.forward_context():
            tokens = generate(
                task.model,
                prompt.to(task.device),
                self.tokens,
                context=trainer.datamodule.length,
                generator=torch.Generator().manual_seed(0),
                **self.sampling,
            )
        text = vocabulary.decode(tokens[0].cpu()).decode(errors="replace")
        step = trainer.global_step
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"step-{step}.txt").write_text(text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_text("sample", columns=["step", "text"], data=[[step, text]], step=step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", text, step)
