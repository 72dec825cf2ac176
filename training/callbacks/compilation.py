"""torch.compile for a model's blocks and its head."""

import lightning as L
import torch
from torch import nn

from training.phases import Phases

KINDS = 2  # of graphs of a layer: training, and validation without gradients
SPARE = 8  # graphs beside those: other lengths


class Compilation(L.Callback):
    """Compiles the model's blocks and its head before training."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        compile_model(pl_module.model, phases=len(Phases.of(trainer).phases))


def compile_model(model: nn.Module, phases: int = 1) -> None:
    """Compile every block and the head in place: no parameter is renamed.

    One graph serves all layers that are alike, whatever random blocks they draw. Layers with
    windows of their own have a graph each, in each phase of a run anew, and torch would run those
    past its limits of recompilations (8, and 256 in all) uncompiled, with a warning.
    """
    config, needed = torch._dynamo.config, KINDS * phases * len(model.blocks) + SPARE
    config.recompile_limit = max(config.recompile_limit, needed)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, needed)
    for block in model.blocks:
        block.compile()
    # Norm, casts and softmax over thousands of subwords would be passes of their own.
    model.head.compile()
