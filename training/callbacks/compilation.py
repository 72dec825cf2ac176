"""torch.compile for a model's blocks and its head."""

import lightning as L
import torch
from torch import nn

# Graphs of a layer: in training and validation, of the first length and of all lengths, with the
# first window, any other, or one that hides nothing.
KINDS = 2 * 2 * 3
SPARE = 8  # graphs beside those


class Compilation(L.Callback):
    """Compiles the model's blocks and its head before training."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        compile_model(pl_module.model)


def compile_model(model: nn.Module) -> None:
    """Compile every block and the head in place: no parameter is renamed.

    One graph serves all layers that are alike, whatever their random blocks, and three serve all
    windows. Where many layers are not alike, torch would run those past its limits of
    recompilations (8, and 256 in all) uncompiled, with a warning.
    """
    config, needed = torch._dynamo.config, KINDS * len(model.blocks) + SPARE
    config.recompile_limit = max(config.recompile_limit, needed)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, needed)
    # A number of a module that differs between layers, such as the length up to which a window
    # shows all, is no constant of a graph.
    config.allow_unspec_int_on_nn_module = True
    for block in model.blocks:
        block.compile()
    # Norm, casts and softmax over thousands of subwords would be passes of their own.
    model.head.compile()
