"""torch.compile for a model's blocks."""

import lightning as L
import torch
from torch import nn

SPARE = 8  # graphs beside one a layer: other lengths, validation


class Compilation(L.Callback):
    """Compiles the model's blocks before training."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        compile_blocks(pl_module.model)


def compile_blocks(model: nn.Module) -> None:
    """Compile every block in place: no parameter is renamed.

    One graph serves all layers that are alike, whatever random blocks they draw. Layers with
    windows of their own have a graph each, and torch would run those past its limit of
    recompilations (8) uncompiled, with a warning.
    """
    limit = max(torch._dynamo.config.recompile_limit, len(model.blocks) + SPARE)
    torch._dynamo.config.recompile_limit = limit
    for block in model.blocks:
        block.compile()
