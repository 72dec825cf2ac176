"""torch.compile for a model's blocks and its head."""

import logging
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

log = logging.getLogger("strider")

# Graphs of a layer: in training and validation, of the first length and of all lengths, with the
# first window, any other, or one that hides nothing.
KINDS = 2 * 2 * 3
SPARE = 8  # graphs beside those


class Compilation(L.Callback):
    """Compiles the model's blocks and its head; says so, and how long the first step took."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        compile_model(pl_module.model)

    def on_train_start(self, *_: Any) -> None:
        self._compiled = False
        rank_zero_only(log.info)("compiling blocks and head; trainer.compile=false does without")

    def on_train_batch_start(self, *_: Any) -> None:
        if not self._compiled:
            self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        if not self._compiled:
            self._compiled = True
            seconds = time.perf_counter() - self._started
            rank_zero_only(log.info)("compiled: the first pass of training took %.0f s", seconds)


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
    # A block is smaller than a bucket of gradients: dynamo need not split it for their sake.
    config.optimize_ddp = False
    for block in model.blocks:
        block.compile()
    # Norm, casts and softmax over thousands of subwords would be passes of their own.
    model.head.compile()
