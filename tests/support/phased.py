"""A run in three phases that is small enough for tests."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from data.corpora.byte_file import ByteFile
from data.module import SequenceData
from tests.support.tiny import LENGTH, VOCAB, Recorder, TinyModel, fit, tiny_task
from training.callbacks.checkpoints import Checkpoints
from training.phases import Phase, read_phases

CONFIG = f"""
seed: 1
paths: {{output: none}}
task: {{}}
data: {{length: {LENGTH}, batch_tokens: {8 * LENGTH}, micro_tokens: null}}
model: {{_target_: tests.support.phased.Windowed, _convert_: all, dropout: 0.3, windows: [1, 2]}}
optimizer:
  _target_: training.optim.optimizers.adamw
  _partial_: true
  lr: 1.0e-2
  betas: [0.9, 0.95]
  weight_decay: 0.1
  eps: 1.0e-8
schedule:
  {{_target_: training.schedules.constant, _partial_: true, warmup_steps: 10, warmup_share: 0.5}}
trainer: {{max_steps: auto, max_minutes: null, gradient_clip: 1.0}}
phases:
  - {{steps: 3}}
  - steps: 4
    data: {{length: {2 * LENGTH}, batch_tokens: {16 * LENGTH}, micro_tokens: {4 * LENGTH}}}
    optimizer: {{lr: 5.0e-3}}
    model: {{windows: [2, 4]}}
  - steps: 3
    data: {{length: {4 * LENGTH}, batch_tokens: {16 * LENGTH}, micro_tokens: {8 * LENGTH}}}
    optimizer: {{lr: 2.5e-3, weight_decay: 0.0}}
    trainer: {{gradient_clip: 0.5}}
    model: {{windows: [4, 8]}}
"""
LENGTHS, RATES, WINDOWS = [8, 16, 32], [1e-2, 5e-3, 2.5e-3], [[1, 2], [2, 4], [4, 8]]


class Letters(ByteFile):
    vocab_size, units = VOCAB, (1,) * VOCAB


class Windowed(TinyModel):
    """Its windows change what it computes, so that wrong ones do not go unnoticed."""

    def __init__(self, dropout: float, windows: list[int]):
        super().__init__(dropout)
        if len(windows) != len(self.blocks):
            raise ValueError(f"{len(self.blocks)} layers need as many windows, got {windows}.")
        self.windows = windows

    def forward(self, tokens):
        return super().forward(tokens) / sum(self.windows)

    def flops_per_token(self, length):
        return float(length * sum(self.windows))


def phases(changes: dict[str, Any] | None = None) -> list[Phase]:
    """Those of `CONFIG`, with some of its keys changed."""
    config = OmegaConf.create(CONFIG)
    for key, value in (changes or {}).items():
        OmegaConf.update(config, key, value)
    return read_phases(config)


def run(folder: Path, *callbacks, workers=0, dropout=0.3, **settings) -> Recorder:
    """Train in phases, with a checkpoint after every step, and return what was logged."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").touch()
    in_phases = phases({"model.dropout": dropout})
    text = np.random.default_rng(0).integers(VOCAB, size=4_000, dtype=np.uint8)
    (folder / "text").write_bytes(text.tobytes())
    data = SequenceData(
        partial(Letters, fractions=[0.8, 0.1, 0.1]), name="text", path=str(folder / "text"),
        cache=str(folder), length=LENGTH, batch_tokens=8 * LENGTH, micro_tokens=None,
        validation_tokens=200, vocab_size=VOCAB, documents="stream", workers=workers, seed=0,
        phases=[phase.batching for phase in in_phases],
    )  # fmt: skip
    task = tiny_task()
    task.model = Windowed(dropout, [1, 1])
    callbacks = [*callbacks, Checkpoints(folder, every_steps=1)]
    settings = {"max_steps": 10, "phases": in_phases} | settings
    return fit(folder, task, data, callbacks=callbacks, **settings)[1]


def main(folder: Path) -> None:
    """Train on two processes; rank 0 writes what it logged to ``folder/metrics.json``."""
    recorder = run(folder, dropout=0.0, devices=2, strategy="ddp")
    if recorder.metrics:
        (folder / "metrics.json").write_text(json.dumps(recorder.metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
