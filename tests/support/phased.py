"""A run in three phases that is small enough for tests."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

from data.corpora.byte_file import ByteFile
from data.module import SequenceData
from tests.support.tiny import LENGTH, VOCAB, Recorder, TinyModel, fit, tiny_task
from training.callbacks.checkpoints import Checkpoints
from training.phases import Phase
from training.schedules import constant

PHASES = [
    Phase("phases[0]", 0, 3, LENGTH, 8 * LENGTH, None, 1e-2, 1.0, [1, 2]),
    Phase("phases[1]", 3, 4, 2 * LENGTH, 16 * LENGTH, 4 * LENGTH, 5e-3, 0.5, [2, 4]),
    Phase("phases[2]", 7, 3, 4 * LENGTH, 16 * LENGTH, 8 * LENGTH, 2.5e-3, 0.25, [4, 8]),
]


class Letters(ByteFile):
    vocab_size, units = VOCAB, (1,) * VOCAB


class Windowed(TinyModel):
    """Its windows change what it computes, so that wrong ones do not go unnoticed."""

    windows = (1, 1)

    def set_windows(self, windows):
        if len(windows) != len(self.blocks):
            raise ValueError(f"{len(self.blocks)} layers need as many windows, got {windows}.")
        self.windows = windows

    def forward(self, tokens):
        return super().forward(tokens) / sum(self.windows)

    def flops_per_token(self, length):
        return float(length * sum(self.windows))


def run(folder: Path, *callbacks, workers=0, dropout=0.3, **settings) -> Recorder:
    """Train in `PHASES`, with a checkpoint after every step, and return what was logged."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").touch()
    text = np.random.default_rng(0).integers(VOCAB, size=4_000, dtype=np.uint8)
    (folder / "text").write_bytes(text.tobytes())
    data = SequenceData(
        partial(Letters, fractions=[0.8, 0.1, 0.1]), name="text", path=str(folder / "text"),
        cache=str(folder), length=LENGTH, batch_tokens=8 * LENGTH, micro_tokens=None,
        validation_tokens=200, vocab_size=VOCAB, documents="stream", workers=workers, seed=0,
        phases=[phase.batching for phase in PHASES],
    )  # fmt: skip
    task = tiny_task(schedule=partial(constant, warmup_steps=10, warmup_share=0.5))
    task.model = Windowed(dropout)
    callbacks = [*callbacks, Checkpoints(folder, every_steps=1)]
    settings = {"max_steps": 10, "phases": PHASES} | settings
    return fit(folder, task, data, callbacks=callbacks, **settings)[1]


def main(folder: Path) -> None:
    """Train on two processes; rank 0 writes what it logged to ``folder/metrics.json``."""
    recorder = run(folder, dropout=0.0, devices=2, strategy="ddp")
    if recorder.metrics:
        (folder / "metrics.json").write_text(json.dumps(recorder.metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
