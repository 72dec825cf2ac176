"""How fast a run is: tokens and floating-point operations a second, memory, waiting for data."""

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor

from training.progress import Budget


class Throughput(L.Callback):
    """Logs speed over the steps since it was last logged; validation and saving do not count.

    - ``tokens_per_second``: over all ranks.
    - ``model_tflops_per_second``: 1e12 operations a second, over all ranks, as the model counts
      them: those its attention pattern does, without recomputation.
    - ``mfu``: the share of the cards' peak that this is, for cards whose peak Lightning knows.
    - ``peak_memory_gib``: largest GPU memory in tensors so far, on the first rank.
    - ``data_wait_share``: share of the time in which the first rank waited for its next batch.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = Budget.of(trainer).clock
        self._flops_per_token: float | None = None
        self._peak_flops = self._peak(trainer)
        self._restart()

    def on_train_batch_start(self, *_) -> None:
        self._waited += self._clock.lap

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch: Tensor, batch_idx
    ) -> None:
        rows, columns = batch.shape
        self._tokens += rows * (columns - 1) * trainer.world_size
        if self._flops_per_token is None:
            self._flops_per_token = pl_module.model.flops_per_token(columns - 1)
        step = trainer.global_step
        if step > self._step and step % trainer.log_every_n_steps == 0:
            self.log_dict(self._measure(pl_module.device))
            self._restart(step)

    def _restart(self, step: int = 0) -> None:
        self._step, self._tokens, self._waited = step, 0, 0.0
        self._start = self._clock.seconds

    def _measure(self, device: torch.device) -> dict[str, float]:
        seconds = self._clock.seconds - self._start
        flops_per_second = self._tokens * self._flops_per_token / seconds
        metrics = {
            "tokens_per_second": self._tokens / seconds,
            "model_tflops_per_second": flops_per_second / 1e12,
            "data_wait_share": self._waited / seconds,
        }
        if self._peak_flops is not None:
            metrics["mfu"] = flops_per_second / self._peak_flops
        if device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return metrics

    @staticmethod
    def _peak(trainer: L.Trainer) -> float | None:
        """Operations a second of all cards together in the precision of the matrix products."""
        dtype = torch.bfloat16 if trainer.precision.startswith("bf16") else torch.float32
        one = get_available_flops(trainer.strategy.root_device, dtype)
        return one * trainer.world_size if one else None
