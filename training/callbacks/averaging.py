"""A moving average of the weights, kept beside them."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks


class EMAWeightAveraging(callbacks.EMAWeightAveraging):
    """Lightning's, on the device of the model and in one launch that nothing waits for.

    Lightning's own keeps the average on the CPU, where the model is while callbacks are set up, and
    moves it parameter by parameter. What a checkpoint holds is the same.

    Args:
        decay: share of the average that is kept at each optimizer step.
        settings: others of Lightning's, such as ``update_every_n_steps``.
    """

    def __init__(self, decay: float = 0.999, **settings: Any):
        super().__init__(decay=decay, **settings)
        self.decay = decay

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._device = self._device or trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        step = trainer.global_step
        if step <= self._latest_update_step or not self.should_update(step_idx=step - 1):
            return
        kept = self.decay if self._latest_update_step else 0.0  # the first takes the weights
        self._latest_update_step = step
        average = [*self._average_model.module.parameters(), *self._average_model.module.buffers()]
        current = [*pl_module.parameters(), *pl_module.buffers()]
        torch._foreach_lerp_(average, [p.to(average[0].device) for p in current], 1 - kept)
        self._average_model.n_averaged += 1
