"""Every token is scored exactly once, whatever the window, and nothing crosses a document."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evaluation.likelihood import likelihood, sliding_windows, total
from evaluation.measures import bits_per_byte, bits_per_dim, word_perplexity
from evaluation.positions import bits_by_position, draw_positions

START = 256


class Recorder(nn.Module):
    """Scores a target by its own value, and sees that inputs precede targets."""

    vocab_size = START

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.scored: list[int] = []

    def nats(self, inputs, targets):
        scored = targets >= 0
        # The documents count upwards, each from a multiple of 50.
        before = torch.where(targets % 50 == 0, START, targets - 1)
        assert torch.equal(inputs[scored], before[scored])
        self.scored += targets[scored].tolist()
        return targets.clamp(min=0).float()


class Uniform(nn.Module):
    """Gives every token the same probability."""

    vocab_size = START

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def nats(self, inputs, targets):
        return torch.where(targets >= 0, math.log(self.vocab_size), 0.0)


def documents(sizes):
    """Tokens and starts of documents that count upwards from 0, 50, 100 ..."""
    pieces = [np.arange(size) + 50 * n for n, size in enumerate(sizes)]
    return np.concatenate(pieces).astype(np.uint8), np.append(0, np.cumsum(sizes)[:-1])


def score(model, tokens, starts=(0,), units=None, context=8, stride=4, batch_tokens=16):
    units = np.ones(256, dtype=np.int64) if units is None else units
    parts = likelihood(
        model, tokens, starts, units, context=context, stride=stride, batch_tokens=batch_tokens
    )
    return total(parts)


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=5)
windows = st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c)))


@given(sizes, windows)
def test_windows_cover_each_token_once_with_enough_context(sizes, window):
    context, stride = window
    tokens, starts = documents(sizes)
    ends = dict(zip(starts.tolist(), [*starts[1:].tolist(), len(tokens)], strict=True))
    covered = []
    for w in sliding_windows(starts.tolist(), len(tokens), context, stride):
        assert w.document <= w.start <= w.scored < w.stop <= ends[w.document]
        assert w.stop - w.start == min(context, ends[w.document] - w.document)
        assert w.start == w.document or w.scored - w.start >= context - stride
        covered += range(w.scored, w.stop)
    assert covered == list(range(len(tokens)))


@given(sizes, windows, st.integers(1, 100))
def test_the_sum_does_not_depend_on_context_stride_or_batch(sizes, window, batch_tokens):
    tokens, starts = documents(sizes)
    model, units = Recorder(), np.arange(256)
    result = score(model, tokens, starts, units, *window, batch_tokens)
    assert model.scored == tokens.tolist()
    assert len(result.nats) == window[0]
    assert result.nats.sum() == result.units.sum() == tokens.sum(dtype=int)
    assert result.tokens.sum() == len(tokens)


@given(sizes, windows)
def test_a_uniform_model_has_eight_bits_per_byte_and_per_dimension(sizes, window):
    tokens, starts = documents(sizes)
    result = score(Uniform(), tokens, starts, None, *window)
    nats, units = result.nats.sum(), int(result.units.sum())
    assert bits_per_byte(nats, units) == pytest.approx(8, abs=1e-6)
    assert bits_per_dim(nats, units) == pytest.approx(8, abs=1e-6)


def test_position_is_what_a_token_saw_before_it():
    tokens, starts = documents([10, 3])
    result = score(Recorder(), tokens, starts, context=8, stride=2)
    assert result.tokens.tolist() == [2, 2, 2, 1, 1, 1, 2, 2]
    assert result.nats.tolist() == [50, 52, 54, 3, 4, 5, 6 + 8, 7 + 9]


def test_bits_by_position_are_means_over_enough_of_the_text(tmp_path):
    tokens = np.zeros(40_000, dtype=np.uint8)
    result = score(Uniform(), tokens, context=2000, stride=2000, batch_tokens=10_000)
    middles, bits, units = bits_by_position(result, "bits_per_byte")
    assert bits == pytest.approx([8] * len(bits))
    assert middles == sorted(middles)
    assert 64 < middles[0] < middles[-1] <= 2001  # 20 windows: 1,000 bytes are 50 positions
    assert min(units) >= 1000
    path = draw_positions(result, "bits_per_byte", tmp_path / "bits.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("context", "stride"), [(4, 5), (4, 0), (0, 0)])
def test_an_impossible_window_is_refused(context, stride):
    with pytest.raises(ValueError, match=f"stride={stride}, context={context}"):
        sliding_windows([0], 10, context, stride)


def test_word_perplexity_of_a_worked_example():
    # "one two six\n" is 12 bytes; at 1.5 bits each, 18 bits; over 3 words, 6 bits a word: one
    # choice of 64.
    assert word_perplexity(12 * 1.5 * math.log(2), words=3) == pytest.approx(64)
    assert word_perplexity(1e9, 1) == math.inf


@pytest.mark.parametrize("measure", [bits_per_byte, bits_per_dim, word_perplexity])
def test_a_measure_over_nothing_is_refused(measure):
    with pytest.raises(ValueError, match="got 0"):
        measure(1.0, 0)
