"""Windows: which tokens a sample holds, as functions of numbers alone."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.windows import (
    PADDING,
    EvaluationWindows,
    TrainingWindows,
    evaluation_windows,
    training_samples,
)

START = 1_000_000  # a start id that no token equals
sizes = st.integers(1, 300)
lengths = st.integers(1, 40)


def positions(tokens, length, seed=0):
    """Training windows over tokens that are their own positions."""
    return TrainingWindows(np.arange(tokens), length, START, seed)


@given(tokens=sizes, length=lengths, epoch=st.integers(0, 3), seed=st.integers(0, 9))
def test_an_epoch_visits_every_window_once(tokens, length, epoch, seed):
    if tokens < length:
        return
    windows = positions(tokens, length, seed)
    first = epoch * windows.windows
    rows = windows[range(first, first + windows.windows)]
    targets = np.sort(rows[:, 1:].ravel())
    assert np.array_equal(targets, np.arange(targets[0], targets[0] + targets.size))
    assert tokens - targets.size < 2 * length


@given(tokens=st.integers(40, 300), length=lengths, sample=st.integers(0, 100))
def test_a_row_is_the_preceding_token_and_the_window(tokens, length, sample):
    windows = positions(tokens, length)
    start = windows.start(sample)
    (row,) = windows[[sample]]
    assert row.dtype == np.int64
    assert row[0] == (start - 1 if start else START)
    assert row[1:].tolist() == list(range(start, start + length))


def test_the_window_at_the_very_start_has_the_start_id():
    assert positions(tokens=8, length=8)[[0]].tolist() == [[START, *range(8)]]


def test_epochs_differ_in_order_and_in_the_borders_of_their_windows():
    windows = positions(10_000, 64)
    epochs = [
        [windows.start(sample) for sample in range(first, first + windows.windows)]
        for first in (0, windows.windows)
    ]
    assert epochs[0][0] % 64 != epochs[1][0] % 64
    assert np.argsort(epochs[0]).tolist() != np.argsort(epochs[1]).tolist()


def test_the_order_depends_on_the_seed_and_on_nothing_read_before():
    samples = [70, 3, 500, 4]
    fresh = [positions(1_000, 16, seed=1)[[sample]][0].tolist() for sample in samples]
    assert positions(1_000, 16, seed=1)[samples].tolist() == fresh
    assert positions(1_000, 16, seed=2)[samples].tolist() != fresh


def test_a_window_longer_than_the_data_is_one_sentence():
    message = r"data\.length=11 is longer than the training split of 10 tokens; lower data\.length"
    with pytest.raises(ValueError, match=message):
        positions(10, 11)


@given(
    world_size=st.integers(1, 4),
    passes=st.integers(1, 3),
    micro=st.integers(1, 4),
    first=st.integers(0, 50),
)
def test_ranks_and_passes_share_each_step_without_overlap(world_size, passes, micro, first):
    batch = world_size * passes * micro
    seen = []
    for rank in range(world_size):
        samples = training_samples(
            first, batch=batch, rank=rank, world_size=world_size, micro=micro
        )
        seen += [sample for part in islice(samples, 2 * passes) for sample in part]
    assert sorted(seen) == list(range(first * batch, (first + 2) * batch))


@settings(max_examples=200)
@given(tokens=sizes, length=lengths, world_size=st.integers(1, 5), micro=st.integers(1, 4))
def test_every_validation_token_is_scored_exactly_once(tokens, length, world_size, micro):
    windows = EvaluationWindows(np.arange(tokens), length, START)
    orders = [
        evaluation_windows(tokens, length, rank=rank, world_size=world_size, micro=micro)
        for rank in range(world_size)
    ]
    rows = np.concatenate([windows[part] for order in orders for part in order])
    inputs, targets = rows[:, :-1], rows[:, 1:]
    scored = targets != PADDING
    assert sorted(targets[scored]) == list(range(tokens))
    # what precedes a scored token is the token before it
    assert np.array_equal(inputs[scored], np.where(targets == 0, START, targets - 1)[scored])
    assert len({len(order) for order in orders}) == 1
    assert all(1 <= len(part) <= micro for order in orders for part in order)
