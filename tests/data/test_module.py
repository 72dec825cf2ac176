"""SequenceData: the same steps for any number of workers, devices and passes, and on resume."""

import multiprocessing
import os
from functools import partial
from itertools import islice
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator

from data.batches.batching import Batching
from data.corpora import Split, stream
from data.corpora.byte_file import ByteFile
from data.module import SequenceData

LENGTH, BATCH_TOKENS = 16, 128


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(np.random.default_rng(0).integers(256, size=4_000, dtype=np.uint8).tobytes())
    return path


@pytest.fixture
def make_data(text):
    corpus = partial(ByteFile, fractions=[0.5, 0.3, 0.2])
    defaults = {
        "name": "text",
        "path": str(text),
        "cache": "unused",
        "length": LENGTH,
        "batch_tokens": BATCH_TOKENS,
        "micro_tokens": None,
        "validation_tokens": None,
        "vocab_size": 256,
        "documents": "stream",
        "workers": 0,
        "seed": 1,
    }

    def make(step=0, rank=0, world_size=1, accelerator=None, **changes):
        data = SequenceData(corpus, **defaults | changes)
        data.trainer = SimpleNamespace(
            global_step=step,
            global_rank=rank,
            world_size=world_size,
            accelerator=accelerator or CPUAccelerator(),
        )
        return data

    return make


def steps(data, count):
    """The next ``count`` steps' rows of this device: ``(count, rows, length + 1)``."""
    passes = data.accumulation(data.trainer.world_size)
    batches = islice(data.train_dataloader(), count * passes)
    return torch.cat([row_of(batch) for batch in batches]).view(count, -1, data.length + 1)


def row_of(batch):
    """The rows ``(B, length + 1)`` that became a batch, for data with one start."""
    return torch.cat([batch.inputs[:, :1], batch.targets], dim=1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers(make_data, workers):
    assert torch.equal(steps(make_data(workers=workers), 30), steps(make_data(), 30))


@pytest.mark.parametrize("micro_tokens", [None, LENGTH, 2 * LENGTH, 16 * LENGTH])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_does_not_depend_on_devices_and_passes(make_data, world_size, micro_tokens):
    shares = [
        steps(make_data(rank=rank, world_size=world_size, micro_tokens=micro_tokens), 30)
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat(shares, dim=1), steps(make_data(), 30))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_at_a_later_step_equals_skipping_to_it(make_data, workers):
    resumed = make_data(step=17, workers=workers, micro_tokens=2 * LENGTH)
    assert torch.equal(steps(resumed, 8), steps(make_data(), 25)[17:])


PHASES = [
    Batching("phases[0].data", 0, LENGTH, BATCH_TOKENS, None),
    Batching("phases[1].data", 3, 2 * LENGTH, 2 * BATCH_TOKENS, 4 * LENGTH),
    Batching("phases[2].data", 5, 4 * LENGTH, 4 * BATCH_TOKENS, 4 * LENGTH),
]


def phased_steps(data, count):
    """The rows of this device in each step from the one that the trainer is at."""
    batches, found = iter(data.train_dataloader()), []
    for step in range(data.trainer.global_step, count):
        data.phase = sum(phase.first_step <= step for phase in PHASES) - 1
        passes = data.accumulation(data.trainer.world_size)
        found.append(torch.cat([row_of(batch) for batch in islice(batches, passes)]))
    return found


@pytest.fixture
def phased(make_data):
    return phased_steps(make_data(phases=PHASES), 8)


def test_each_phase_has_its_length_and_batch(phased):
    shapes = [(8, LENGTH + 1)] * 3 + [(8, 2 * LENGTH + 1)] * 2 + [(8, 4 * LENGTH + 1)] * 3
    assert [tuple(rows.shape) for rows in phased] == shapes


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("step", range(7))
def test_a_run_in_phases_begins_anywhere_on_any_number_of_devices(
    make_data, phased, world_size, step
):
    shares = [
        phased_steps(make_data(step=step, rank=rank, world_size=world_size, phases=PHASES), 8)
        for rank in range(world_size)
    ]
    for rows, expected in zip(zip(*shares, strict=True), phased[step:], strict=True):
        assert torch.equal(torch.cat(rows), expected)


@pytest.mark.parametrize("step", [0, 4])
def test_workers_read_ahead_across_the_end_of_a_phase(make_data, phased, step):
    rows = phased_steps(make_data(step=step, workers=2, phases=PHASES), 8)
    for actual, expected in zip(rows, phased[step:], strict=True):
        assert torch.equal(actual, expected)


def test_the_first_phase_is_the_beginning_of_a_run_without_phases(make_data, phased):
    assert torch.equal(torch.stack(phased[:3]), steps(make_data(), 3))


def test_a_phase_has_an_order_of_its_own(make_data):
    twice = [Batching(f"phases[{n}].data", 4 * n, 16, 128, None) for n in range(2)]
    rows = steps(make_data(phases=twice), 8)
    assert not torch.equal(rows[:4], rows[4:])


def test_validation_is_cut_to_the_length_of_the_phase(make_data):
    data = make_data(phases=PHASES)
    data.phase = 2
    assert {batch.inputs.shape[1] for batch in data.val_dataloader()} == {4 * LENGTH}
    assert data.length == 4 * LENGTH


def test_a_batch_is_int64_tokens_of_one_pass(make_data):
    data = make_data(world_size=2, micro_tokens=2 * LENGTH)
    batch = next(iter(data.train_dataloader()))
    for tokens in (batch.inputs, batch.targets):
        assert (tokens.dtype, tokens.shape) == (torch.int64, (2, LENGTH))
    assert batch.documents is None
    assert data.accumulation(2) == 2
    assert data.tokens_per_step == BATCH_TOKENS


def test_training_has_no_end(make_data):
    with pytest.raises(TypeError):
        len(make_data().train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_the_global_random_state(make_data, workers):
    before = torch.get_rng_state()
    data = make_data(workers=workers)
    steps(data, 1)
    next(iter(data.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_are_out_of_reach_of_ctrl_c(make_data):
    batches = iter(make_data(workers=1).train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert os.getpgid(worker.pid) != os.getpgrp()


def validation_targets(data):
    targets = torch.cat([batch.targets.flatten() for batch in data.val_dataloader()])
    return targets[targets >= 0]


def test_validation_scores_windows_from_all_over_its_split(make_data):
    data = make_data(validation_tokens=5 * LENGTH + 3)
    tokens = data.split("validation").tokens
    windows = -(-len(tokens) // LENGTH)
    firsts = [n * windows // 5 * LENGTH for n in range(5)]
    expected = np.concatenate([tokens[first : first + LENGTH] for first in firsts])
    assert validation_targets(data).tolist() == expected.tolist()


def test_validation_of_short_documents_counts_their_tokens(make_data, monkeypatch):
    data = make_data(documents="split", validation_tokens=1000)
    starts = np.arange(0, 20_000, 5)  # of documents of 5 tokens, each in a window of its own
    split = Split(np.zeros(20_000, dtype=np.uint8), starts)
    monkeypatch.setattr(data, "split", lambda name: split)
    assert len(validation_targets(data)) == 1000


def test_validation_takes_the_whole_split_if_it_is_smaller(make_data):
    data = make_data(validation_tokens=10**9)
    assert validation_targets(data).tolist() == data.split("validation").tokens.tolist()


@pytest.mark.parametrize(
    ("accelerator", "tokens"), [(CPUAccelerator, 65_536), (CUDAAccelerator, 1_048_576)]
)
def test_validation_is_shorter_on_a_cpu(make_data, monkeypatch, accelerator, tokens):
    data = make_data(accelerator=accelerator(), length=1024, batch_tokens=4096)
    monkeypatch.setattr(data, "split", lambda name: stream(np.zeros(2_000_000, dtype=np.uint8)))
    assert sum(len(part) for part in data.val_dataloader().sampler) * 1024 == tokens


def test_a_validation_batch_is_no_larger_than_a_training_pass(make_data):
    in_two_passes = make_data(world_size=2, micro_tokens=2 * LENGTH).val_dataloader()
    assert max(len(batch.inputs) for batch in in_two_passes) == 2
    in_one_pass = make_data(world_size=2).val_dataloader()
    assert max(len(batch.inputs) for batch in in_one_pass) == 4


def test_splits_are_at_hand_without_a_trainer(make_data):
    data = make_data()
    del data.trainer
    data.prepare_data()
    assert isinstance(data.split("test").tokens, np.memmap)
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [2000, 1200, 800]
    with pytest.raises(ValueError, match="one of train, validation, test, got 'tset'"):
        data.split("tset")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, r"data\.length must be at least 1, got data\.length=0"),
        ({"length": 24}, r"data\.length = 24, got data\.batch_tokens=128; set .*=120"),
        ({"micro_tokens": 24}, r"data\.length = 16, got data\.micro_tokens=24"),
        ({"batch_tokens": 0}, r"got data\.batch_tokens=0; set data\.batch_tokens=16"),
        ({"validation_tokens": 0}, r"data\.validation_tokens must be at least 1"),
        ({"micro_tokens": 48}, r"devices x data\.micro_tokens = 48, got data\.batch_tokens=128"),
        ({"world_size": 3}, r"devices x data\.length = 48, got data\.batch_tokens=128"),
        ({"length": 2048, "batch_tokens": 2048}, r"data\.length=2048 is longer than .* 2,000"),
        (
            {"phases": [("phases[1].data", 0, 24, 128, None)]},
            r"phases\[1\]\.data\.length = 24, got phases\[1\]",
        ),
        (
            {"phases": [("phases[1].data", 0, 2048, 2048, None)]},
            r"phases\[1\]\.data\.length=2048 is",
        ),
        (
            {"phases": [("phases[3].data", 0, 16, 48, None)], "world_size": 2},
            r"devices x phases\[3\]\.data\.length = 32, got phases\[3\]\.data\.batch_tokens=48",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_training(make_data, changes, message):
    def prepare():
        if phases := changes.get("phases"):
            changes["phases"] = [*PHASES, *(Batching(*phase) for phase in phases)]
        data = make_data(**changes)
        data.prepare_data()
        data.setup("fit")

    with pytest.raises(ValueError, match=message):
        prepare()


class Recorder(L.LightningModule):
    """Keeps the rows that it is given to train on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows = []

    def training_step(self, batch, index):
        self.rows.append(row_of(batch))
        return self.weight * 1.0

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, max_steps, resume=None):
    task = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=max_steps,
        accumulate_grad_batches=data.accumulation(1),
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return torch.cat(task.rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_fit_continues_with_the_next_rows(make_data, tmp_path, workers):
    def data(micro_tokens):
        return make_data(workers=workers, micro_tokens=micro_tokens)

    whole = fit(data(2 * LENGTH), tmp_path, max_steps=11)
    first = fit(data(2 * LENGTH), tmp_path, max_steps=5)
    rest = fit(data(2 * LENGTH), tmp_path, max_steps=11, resume=tmp_path / "last.ckpt")
    assert torch.equal(torch.cat([first, rest]), whole)
