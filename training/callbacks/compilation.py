"""torch.compile for a model's blocks."""

import lightning as L
from torch import nn


class Compilation(L.Callback):
    """Compiles the model's blocks before training."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        compile_blocks(pl_module.model)


def compile_blocks(model: nn.Module) -> None:
    """Compile every block in place: one graph serves all layers, and no parameter is renamed."""
    for block in model.blocks:
        block.compile()
