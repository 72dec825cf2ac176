"""A model, data and a run of them that are small enough for tests of training."""

import json
import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

from data.batches.batch import Batch, NextTokenBatches
from data.batches.batching import Batching
from data.prepare.vocabulary import Bytes
from training import schedules
from training.callbacks.interruption import Interruption
from training.callbacks.progress_bar import ProgressBar
from training.callbacks.throughput import Throughput
from training.objectives import NextToken
from training.optim import optimizers
from training.phases import Phase
from training.task import SequenceTask
from training.trainer import make_trainer

VOCAB = 16
LENGTH = 8
WHOLE_RUN = Phase("data", Batching("data", 0, LENGTH, 8 * LENGTH, None))


class TinyModel(nn.Module):
    """An embedding, two blocks of one matrix each with dropout, and a head."""

    vocab_size = VOCAB

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB + 1, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout))
            for _ in range(2)
        )
        self.head = nn.Linear(8, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def check_length(self, length):
        pass  # it has no positions

    def cache(self, length):
        return self  # no token looks back: nothing is kept

    def advance(self):
        pass

    def next_logits(self, tokens, cache):
        return self(tokens)[:, -1]

    def loss(self, inputs, targets, documents=None):
        logits = self(inputs).flatten(0, 1).float()
        nats = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
        return nats, (targets >= 0).sum()

    def losses(self) -> dict:
        return {}

    def attentions(self) -> list:
        return []

    def flops_per_token(self, length: int) -> float:
        return 1e6


class TinyData(L.LightningDataModule):
    """Global batches of 8 rows, pure functions of the step; ranks and micro-batches are slices."""

    measure, vocabulary, validation_words = "bits_per_byte", Bytes(), None
    image_shape, length = None, LENGTH
    units = (1,) * VOCAB

    def __init__(self, accumulation: int = 1, validation_rows: int = 5):
        super().__init__()
        self.passes = accumulation
        self.validation_rows = validation_rows

    def accumulation(self, world_size):
        return self.passes

    def train_dataloader(self):
        return self._micro_batches()

    def _micro_batches(self):
        step = self.trainer.global_step
        while True:
            share = rows(8, seed=step).chunk(self.trainer.world_size)[self.trainer.global_rank]
            yield from map(batch_of, share.chunk(self.passes))
            step += 1

    def val_dataloader(self):
        held_out = rows(self.validation_rows, seed=-1)
        held_out[-1, -3:] = -1  # padding
        mine = held_out[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader([batch_of(row[None]) for row in mine], batch_size=None)


def batch_of(rows: torch.Tensor) -> Batch:
    """Rows ``(B, L + 1)`` as next-token batches."""
    return NextTokenBatches(None, VOCAB, pack=False).batch(rows)


def rows(count: int, seed: int) -> torch.Tensor:
    """Token ids that count upwards from a random start: something to learn."""
    start = torch.randint(VOCAB, (count, 1), generator=torch.Generator().manual_seed(seed + 10))
    return (start + torch.arange(LENGTH + 1)) % VOCAB


class Recorder(Logger):
    """Keeps what is logged, as {step: metrics}."""

    name, version = "recorder", ""

    def __init__(self):
        super().__init__()
        self.metrics: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step):
        self.metrics.setdefault(step, {}).update(metrics)

    def curve(self, key: str) -> dict[int, float]:
        return {step: row[key] for step, row in self.metrics.items() if key in row}


def tiny_trainer(output, recorder: Recorder, *, callbacks=(), **settings) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "nodes": 1,
        "strategy": "auto",
        "precision": None,
        "max_steps": 6,
        "max_minutes": None,
        "validate_every": None,
        "log_every": 1,
        "gradient_clip": 1.0,
        "compile": False,
        "phases": [WHOLE_RUN],
    }
    return make_trainer(
        output=output, loggers=[recorder], callbacks=callbacks, **(defaults | settings)
    )


def tiny_task(dropout: float = 0.0, optimizer=None, schedule=None) -> SequenceTask:
    return SequenceTask(
        model=TinyModel(dropout),
        objective=NextToken(),
        optimizer=optimizer
        or partial(optimizers.adamw, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8),
        schedule=schedule or partial(schedules.cosine, warmup_steps=2, final=0.1),
        seed=1,
    )


def fit(output, task=None, data=None, resume=None, **settings) -> tuple[L.Trainer, Recorder]:
    """Train, and return the trainer and what it logged."""
    recorder = Recorder()
    trainer = tiny_trainer(output, recorder, **settings)
    trainer.fit(task or tiny_task(), datamodule=data or TinyData(), ckpt_path=resume)
    return trainer, recorder


def muon_task() -> SequenceTask:
    return tiny_task(
        optimizer=partial(
            optimizers.muon, lr=0.02, momentum=0.95, weight_decay=0.05, adamw_lr=1e-2,
            adamw_betas=(0.9, 0.95), adamw_eps=1e-8,
        )
    )  # fmt: skip


def main(output: str, muon: bool = False, **settings) -> None:
    """Train on several processes; rank 0 writes what it logged to ``output/metrics.json``.

    Raises:
        AssertionError: if their weights differ in a bit.
    """
    callbacks = [Throughput(), ProgressBar(), Interruption()]
    task = muon_task() if muon else tiny_task()
    trainer, recorder = fit(output, task, callbacks=callbacks, **settings)
    weights = torch.cat([p.detach().flatten() for p in task.parameters()])
    first = trainer.strategy.broadcast(weights)
    assert torch.equal(first, weights), "processes have other weights"
    if trainer.is_global_zero:
        Path(output, "metrics.json").write_text(json.dumps(recorder.metrics))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
