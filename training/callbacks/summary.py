"""What a run is about to train, and where it left what it trained."""

import logging
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from data.batches.batch import Batch
from evaluation.layers import kinds_of_layers, share_of_draws_inside
from kernels.patterns import Pattern

log = logging.getLogger("strider")


class Summary(L.Callback):
    """Says at the start what is trained on what, and at the end where the result is.

    Args:
        output: the run's folder.
    """

    def __init__(self, output: str):
        self.output = Path(output)
        self.trained = self.looked_at_documents = False

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        model, data = task.model, trainer.datamodule
        kinds = kinds_of_layers(model, data.length)
        log.info("run %s", self.output)
        log.info(
            "model: %d layers of %s, dim %d, %d heads, %s parameters",
            model.layers,
            " and ".join(kind.label for kind in kinds),
            model.dim,
            model.heads,
            f"{sum(p.numel() for p in model.parameters()):,}",
        )
        for kind in kinds:
            keys, causal = kind.visible.keys_per_query(data.length), kind.attention.is_causal
            most = (data.length + 1) / 2 if causal else data.length
            log.info(
                "%s: a token sees %.0f of %.0f%s keys (%.1f %%): %s",
                kind.label,
                keys,
                most,
                " causal" if causal else "",
                100 * keys / most,
                kind.visible,
            )
        log.info(
            "data: %s, windows of %s tokens, %s tokens a step: devices %d x passes %d x tokens %s",
            data.name,
            f"{data.length:,}",
            f"{data.tokens_per_step:,}",
            trainer.world_size,
            passes := trainer.accumulate_grad_batches,
            f"{data.tokens_per_step // (trainer.world_size * passes):,}",
        )

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.trained = True

    @rank_zero_only
    def on_train_batch_start(
        self, trainer: L.Trainer, task: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self.looked_at_documents or batch.documents is None:
            return
        self.looked_at_documents = True
        documents, model = batch.documents.cpu(), task.model
        for kind in kinds_of_layers(model, documents.shape[1]):
            if not isinstance(kind.visible, Pattern):
                continue
            share = share_of_draws_inside(kind.visible, documents, model.heads)
            if share is not None:
                log.info(
                    "%s: random blocks are drawn for whole rows; in the first batch, %.0f %% lie "
                    "inside their document, and others show nothing",
                    kind.label,
                    100 * share,
                )

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if not self.trained:
            log.info(
                "this run was finished before; to go on, raise trainer.max_steps or add to phases, "
                "and set resume=%s",
                trainer.ckpt_path,
            )
        best = self.output / "checkpoints" / "best.ckpt"
        if best.exists():
            log.info("evaluate it with: python eval.py checkpoint=%s", best)
