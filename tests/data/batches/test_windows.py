"""Windows: which tokens a sample holds, as functions of numbers alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.windows import (
    PADDING,
    EvaluationWindows,
    Stream,
    TrainingWindows,
    evaluation_order,
    training_samples,
)
from data.corpora import Split, stream

START = 1_000_000  # a start id that no token equals
sizes = st.integers(1, 300)
lengths = st.integers(1, 40)
books = st.lists(st.integers(1, 90), min_size=1, max_size=6)  # tokens of each document


def numbered(documents):
    """Documents of these sizes; each token is its own position in the split."""
    ends = np.cumsum(documents)
    return Split(np.arange(ends[-1]), np.append(0, ends[:-1]))


def positions(tokens, length, seed=0):
    """Training windows over a stream whose tokens are their own positions."""
    return TrainingWindows(Stream(stream(np.arange(tokens)), "stream", START), length, seed)


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
    start = int(windows.place(sample)[0])
    (row,) = windows[[sample]]
    assert row.dtype == np.int64
    assert row[0] == (start - 1 if start else START)
    assert row[1:].tolist() == list(range(start, start + length))


def test_the_window_at_the_very_start_has_the_start_id():
    assert positions(tokens=8, length=8)[[0]].tolist() == [[START, *range(8)]]


def test_epochs_differ_in_order_and_in_the_borders_of_their_windows():
    windows = positions(10_000, 64)
    epochs = [
        [int(windows.place(sample)[0]) for sample in range(first, first + windows.windows)]
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
            range(first, first + 2), batch=batch, rank=rank, world_size=world_size, micro=micro
        )
        seen += [sample for part in samples for sample in part]
    assert sorted(seen) == list(range(first * batch, (first + 2) * batch))


@settings(max_examples=200)
@given(
    documents=books,
    mode=st.sampled_from(["stream", "pack", "split"]),
    length=lengths,
    world_size=st.integers(1, 5),
    micro=st.integers(1, 4),
)
def test_every_validation_token_is_scored_exactly_once(documents, mode, length, world_size, micro):
    split = numbered(documents)
    windows = EvaluationWindows(Stream(split, mode, START), length)
    orders = [
        evaluation_order(range(len(windows)), rank=rank, world_size=world_size, micro=micro)
        for rank in range(world_size)
    ]
    rows = np.concatenate([windows[part] for order in orders for part in order])
    inputs, targets = rows[:, :-1], rows[:, 1:]
    scored = (targets != PADDING) & (targets != START)
    assert sorted(targets[scored]) == list(range(len(split)))
    # What precedes a scored token is the token before it, or the start id.
    starts = [0] if mode == "stream" else split.starts
    begins = np.isin(targets, starts)
    assert np.array_equal(inputs[scored], np.where(begins, START, targets - 1)[scored])
    assert len({len(order) for order in orders}) == 1
    assert all(len(part) == micro for order in orders for part in order)


@given(documents=books, length=st.integers(1, 30), epoch=st.integers(0, 2))
def test_a_split_row_lies_in_one_document_and_each_document_is_visited(documents, length, epoch):
    if max(documents) < length:
        return
    split = numbered(documents)
    windows = TrainingWindows(Stream(split, "split", START), length, seed=0)
    rows = windows[range(epoch * windows.windows, (epoch + 1) * windows.windows)]
    visited = np.zeros(len(documents), dtype=int)
    for row in rows:
        targets = row[1:][row[1:] != PADDING]
        (document,) = set(np.searchsorted(split.starts, targets, side="right") - 1)
        assert len(targets) == min(length, documents[document])
        assert row[0] == (START if targets[0] in split.starts else targets[0] - 1)
        visited[document] += len(targets)
    assert np.all(visited > 0)
    assert np.all(np.array(documents) - visited < 2 * length)


@given(documents=books, length=lengths, sample=st.integers(0, 100))
def test_a_packed_row_is_a_piece_of_the_documents_with_a_start_id_before_each(
    documents, length, sample
):
    split = numbered(documents)
    if len(split) + len(documents) - 1 < length:
        return
    pieces = [[START, *range(a, b)] for a, b in zip(split.starts, split.ends, strict=True)]
    items = [item for piece in pieces for item in piece]
    windows = TrainingWindows(Stream(split, "pack", START), length, seed=0)
    (row,) = windows[[sample]]
    first = int(windows.place(sample)[0])
    assert row.tolist() == items[first : first + length + 1]


def test_images_are_documents_of_exactly_one_window():
    windows = TrainingWindows(Stream(numbered([12] * 5), "split", START), 12, seed=0)
    assert windows.windows == 5
    rows = windows[range(5)]
    assert rows[:, 0].tolist() == [START] * 5
    assert sorted(rows[:, 1:].ravel()) == list(range(60))


def test_the_first_tokens_of_a_split_keep_their_borders():
    first = numbered([3, 4, 5]).first(7)
    assert (len(first), first.starts.tolist(), first.ends.tolist()) == (7, [0, 3], [3, 7])
    assert numbered([3]).first(None).tokens.tolist() == [0, 1, 2]
