"""How fast a run is: tokens and floating-point operations a second, memory, waiting for data."""

import lightning as L
import torch

from data.batches.batch import Batch
from training.callbacks.phases import Phases
from training.run.progress import Budget

# Dense bf16 products a second, without structured sparsity, from NVIDIA's data sheets. (Lightning's
# table has the sparse rate for the H200 and does not know its plain name.)
PEAK_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}


class Throughput(L.Callback):
    """Logs speed over the steps since it was last logged; validation and saving do not count.

    - ``tokens_per_second``: over all ranks.
    - ``model_tflops_per_second``: 1e12 operations a second, over all ranks, as the model counts
      them: those its attention pattern does, without recomputation.
    - ``mfu``: the share of the cards' bf16 peak that this is, for bf16 and cards in `PEAK_FLOPS`.
    - ``peak_memory_gib``: largest GPU memory in tensors so far, on the first rank.
    - ``training_minutes``: since the run's very first step.
    - ``data_wait_share``: share of the time in which the first rank waited for its next batch.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = Budget.of(trainer).clock
        self._phase: int | None = None  # the one that `_flops_per_token` is of
        self._peak_flops = self._peak(trainer)
        self._restart()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx
    ) -> None:
        self._waited += self._clock.lap
        if self._phase != (phase := Phases.of(trainer).index):
            self._phase = phase
            self._flops_per_token = pl_module.model.flops_per_token(batch.inputs.shape[1])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch: Batch, batch_idx
    ) -> None:
        tokens = batch.inputs.numel() * trainer.world_size
        self._tokens += tokens
        self._flops += tokens * self._flops_per_token
        step = trainer.global_step
        if step > self._step and step % trainer.log_every_n_steps == 0:
            self.log_dict(self._measure(pl_module.device))
            self._restart(step)

    def _restart(self, step: int = 0) -> None:
        self._step, self._tokens, self._flops, self._waited = step, 0, 0.0, 0.0
        self._start = self._clock.seconds

    def _measure(self, device: torch.device) -> dict[str, float]:
        seconds = self._clock.seconds - self._start
        flops_per_second = self._flops / seconds
        metrics = {
            "tokens_per_second": self._tokens / seconds,
            "model_tflops_per_second": flops_per_second / 1e12,
            "training_minutes": self._clock.seconds / 60,
            "data_wait_share": self._waited / seconds,
        }
        if self._peak_flops is not None:
            metrics["mfu"] = flops_per_second / self._peak_flops
        if device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return metrics

    @staticmethod
    def _peak(trainer: L.Trainer) -> float | None:
        """Operations a second of all cards together, None if it is not known."""
        device = trainer.strategy.root_device
        if device.type != "cuda" or not trainer.precision.startswith("bf16"):
            return None
        name = torch.cuda.get_device_name(device)
        known = [flops for card, flops in PEAK_FLOPS.items() if card in name]
        return known[0] * trainer.world_size if known else None
