"""Which tokens are masked: how many, with what, never a border, and always the same ones."""

from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.accelerators import CPUAccelerator

from data.batches.masking import EVALUATION, MaskedBatches, Masking
from data.batches.windows import EvaluationWindows, Stream, spread
from data.corpora import Split
from data.corpora.byte_file import ByteFile
from data.module import SequenceData

VOCAB = 100
START, MASK = VOCAB, VOCAB + 1
LENGTH = 16
BERT = Masking(share=0.15, masked=0.8, random=0.1)


def apply(items, masking=BERT, seed=0):
    """Inputs and targets of one window."""
    return masking.apply(np.asarray(items), VOCAB, np.random.default_rng(seed))


@given(tokens=st.integers(0, 200), borders=st.integers(0, 5), padding=st.integers(0, 20))
def test_each_window_has_its_share_of_masks_and_borders_have_none(tokens, borders, padding):
    items = np.array([7] * tokens + [START] * borders + [-1] * padding, dtype=np.int64)
    inputs, targets = apply(items)
    assert (targets >= 0).sum() == min(max(round(0.15 * tokens), 1), tokens)
    assert (targets[tokens:] == -1).all()
    assert (inputs[tokens:] == START).all()


def test_only_masked_positions_are_targets_and_only_they_change():
    items = np.random.default_rng(1).integers(VOCAB, size=1000)
    inputs, targets = apply(items)
    masked = targets >= 0
    assert (targets[masked] == items[masked]).all()
    assert (inputs[~masked] == items[~masked]).all()


def within(count, draws, share):
    """Whether ``count`` of independent draws is within five standard deviations."""
    return abs(count - share * draws) < 5 * (share * (1 - share) * draws) ** 0.5


def test_of_the_masks_80_percent_hide_10_percent_replace_and_10_percent_keep_the_token():
    rows = [apply(np.full(100, 7), seed=seed) for seed in range(2000)]
    inputs, targets = np.stack(rows, axis=1)
    seen = inputs[targets >= 0]
    assert len(seen) == 15 * 2000
    assert within((seen == MASK).sum(), len(seen), 0.8)
    others = (seen != MASK) & (seen != 7)
    assert within(others.sum(), len(seen), 0.1 * (VOCAB - 1) / VOCAB)  # 7 may be drawn as well
    assert within((seen == 7).sum(), len(seen), 0.1 + 0.1 / VOCAB)
    assert set(seen[others]) == set(range(VOCAB)) - {7}
    positions = (targets >= 0).sum(axis=0)
    assert all(within(count, 2000, 0.15) for count in positions)


def test_a_hidden_token_has_no_influence_on_what_the_model_sees():
    items = np.arange(100) % VOCAB
    inputs, _ = apply(items)
    hidden = inputs == MASK
    assert hidden.any()
    changed, targets = apply(np.where(hidden, (items + 1) % VOCAB, items))
    assert (changed == inputs).all()
    assert (targets[hidden] == (items[hidden] + 1) % VOCAB).all()


@given(documents=st.lists(st.integers(1, 40), min_size=1, max_size=5), length=st.integers(1, 30))
@pytest.mark.parametrize("layout", ["stream", "pack", "split"])
def test_evaluation_reads_each_token_once(layout, documents, length):
    ends = np.cumsum(documents)
    split = Split(np.arange(ends[-1]) % VOCAB, np.append(0, ends[:-1]))
    windows = EvaluationWindows(Stream(split, layout, START), length)
    all_tokens = MaskedBatches(windows, Masking(1.0, 0.0, 0.0), VOCAB, EVALUATION, True)
    targets = all_tokens[range(len(windows) + 2)].targets  # and padding for other devices
    assert targets[targets >= 0].tolist() == split.tokens.tolist()


@pytest.fixture
def make_data(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(np.random.default_rng(0).integers(256, size=4_000, dtype=np.uint8).tobytes())
    corpus = partial(ByteFile, fractions=[0.5, 0.3, 0.2])

    def make(step=0, rank=0, world_size=1, **changes):
        settings = {
            "name": "text", "path": str(path), "cache": "unused", "length": LENGTH,
            "batch_tokens": 8 * LENGTH, "micro_tokens": None, "validation_tokens": 1000,
            "vocab_size": 256, "documents": "stream", "workers": 0, "seed": 1, "masking": BERT,
        }  # fmt: skip
        data = SequenceData(corpus, **settings | changes)
        data.trainer = SimpleNamespace(
            global_step=step,
            global_rank=rank,
            world_size=world_size,
            accelerator=CPUAccelerator(),
        )
        return data

    return make


def stacked(batches):
    """Inputs and targets of all batches, ``(rows, 2, L)``."""
    return torch.cat([torch.stack(batch[:2], dim=1) for batch in batches])


def steps(data, count):
    """The next ``count`` steps of this device: ``(count, rows, 2, length)``."""
    passes = data.accumulation(data.trainer.world_size)
    batches = list(islice(data.train_dataloader(), count * passes))
    return stacked(batches).view(count, -1, 2, LENGTH)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro_tokens", [None, LENGTH])
def test_masks_do_not_depend_on_devices_workers_passes_or_a_resume(
    make_data, workers, micro_tokens
):
    whole = steps(make_data(), 30)  # two epochs
    shares = [
        make_data(step=17, rank=rank, world_size=2, workers=workers, micro_tokens=micro_tokens)
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([steps(data, 13) for data in shares], dim=1), whole[17:])


def test_masks_differ_between_samples_epochs_and_seeds(make_data):
    rows = [
        steps(make_data(seed=seed, masking=Masking(0.5, 0.8, 0.1)), 40)[:, :, 1].flatten(0, 1)
        for seed in (1, 2)
    ]
    masked = torch.cat(rows) >= 0  # of two and a half epochs each
    assert len(masked.unique(dim=0)) > 0.95 * len(masked)  # of 12,870 ways to choose 8 of 16


def validation(data):
    return stacked(data.val_dataloader())


def test_every_evaluation_of_every_run_and_device_has_the_same_masks(make_data):
    once = validation(make_data())
    assert torch.equal(validation(make_data(seed=2, step=5)), once)
    shares = [validation(make_data(rank=rank, world_size=2)) for rank in range(2)]
    both = torch.stack(shares, dim=1).flatten(0, 1)  # windows go to the devices in turn
    assert torch.equal(both[: len(once)], once)
    data = make_data()
    batches = data.evaluation_batches(data.split("validation"), LENGTH)
    scored = stacked([batches[spread(len(batches), 1000 // LENGTH)]])
    assert torch.equal(once[: len(scored)], scored)
    assert (once[len(scored) :, 1] == -1).all()  # the rest of the last pass is padding


def test_results_of_masked_tokens_have_a_name_of_their_own(make_data):
    assert make_data(masking=None).measure == "bits_per_byte"
    assert make_data().measure == "bits_per_masked_byte"


@pytest.mark.parametrize(
    "shares", [(0.0, 0.8, 0.1), (1.1, 0.8, 0.1), (0.15, 0.8, 0.3), (0.15, -0.1, 0.3)]
)
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match=rf"share={shares[0]}, masked={shares[1]} and random="):
        Masking(*shares)
