"""What the user sees of a run: a bar on a terminal, plain lines anywhere else."""

import logging
import math
import sys
from contextlib import ExitStack

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from training.run.progress import Budget

log = logging.getLogger("strider")

BAR = "{percentage:5.1f} % |{bar:20}| {postfix}"


class ProgressBar(L.Callback):
    """Share of the run done, phase, loss, bits per byte or dimension, tokens a second, time left.

    A bar if standard error is a terminal; else one line of the logger "strider" each time that
    metrics are logged. Results of a validation are a line in both cases.
    """

    def __init__(self):
        self._open = ExitStack()  # the bar, and what sends log lines past it
        self._bar: tqdm | None = None
        self._known = ""  # of the last step that was logged

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure = trainer.datamodule.measure

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._budget = Budget.of(trainer)
        self._step = trainer.global_step
        self._start = self._budget.progress, self._budget.clock.seconds
        if sys.stderr.isatty():
            self._bar = self._open.enter_context(
                tqdm(total=100, initial=100 * self._budget.progress, bar_format=BAR, leave=True)
            )
            self._open.enter_context(logging_redirect_tqdm())

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        logged = self._step % trainer.log_every_n_steps == 0
        if logged:  # in any other step, a metric would be waited for
            self._known = self._describe(trainer.callback_metrics)
        text = f"{self._known}{tqdm.format_interval(self._seconds_left())} left"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(100 * self._budget.progress - self._bar.n)
        elif logged:
            log.info("step %d · %.1f %% · %s", self._step, 100 * self._budget.progress, text)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        shown = [
            (f"val/{self._measure}", f"{{:.4f}} {self._measure.replace('_', ' ')}"),
            ("val/word_perplexity", "word perplexity {:,.2f}"),
        ]
        text = _join(shown, trainer.callback_metrics)
        log.info("step %d · validation: %s", trainer.global_step, text)

    def teardown(self, *_, **__) -> None:
        self._open.close()

    def on_exception(self, *_) -> None:
        self._open.close()

    def _describe(self, metrics: dict) -> str:
        shown = [
            ("phase", "phase {:.0f}"),
            ("train/loss_nats", "loss {:.4f} nats"),
            (f"train/{self._measure}", f"{{:.4f}} {self._measure.replace('_', ' ')}"),
            ("tokens_per_second", "{:,.0f} tokens/s"),
        ]
        known = _join(shown, metrics)
        return f"{known} · " if known else ""

    def _seconds_left(self) -> int:
        progress, seconds = self._start
        done = self._budget.progress - progress
        spent = self._budget.clock.seconds - seconds
        return math.ceil(spent * (1 - self._budget.progress) / done) if done else 0


def _join(shown: list[tuple[str, str]], metrics: dict) -> str:
    """The metrics that are known, each in its format."""
    return " · ".join(text.format(metrics[key].item()) for key, text in shown if key in metrics)
