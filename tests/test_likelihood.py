"""Every token is scored exactly once, whatever the window."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evaluation.likelihood import likelihood, sliding_windows, total
from evaluation.measures import bits_per_byte


class Recorder(nn.Module):
    """Scores a target by its own value, and sees that inputs precede targets."""

    vocab_size = 256

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.scored: list[int] = []

    def loss(self, inputs, targets):
        for given_tokens, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            for position, target in enumerate(wanted):
                if target >= 0 and position:
                    assert given_tokens[position] == (target - 1) % 256  # the text counts upwards
        chosen = targets[targets >= 0]
        self.scored += chosen.tolist()
        return chosen.sum(dtype=torch.float64), torch.tensor(len(chosen))


windows = st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c)))


@given(st.integers(1, 200), windows)
def test_windows_cover_each_token_once_with_enough_context(tokens, window):
    context, stride = window
    covered = []
    for w in sliding_windows(tokens, context, stride):
        assert w.stop - w.start == min(context, tokens)
        assert w.start == 0 or w.scored - w.start >= context - stride
        covered += range(w.scored, w.stop)
    assert covered == list(range(tokens))


@given(st.integers(1, 200), windows, st.integers(1, 100))
def test_the_sum_does_not_depend_on_context_stride_or_batch(tokens, window, batch_tokens):
    text = (np.arange(tokens) % 256).astype(np.uint8)
    model = Recorder()
    parts = likelihood(model, text, context=window[0], stride=window[1], batch_tokens=batch_tokens)
    result = total(parts)
    assert model.scored == text.tolist()
    assert (result.nats, result.tokens) == (int(text.astype(int).sum()), tokens)


def test_the_first_token_is_predicted_from_the_start_id():
    seen = []

    class Model(Recorder):
        def loss(self, inputs, targets):
            seen.append(inputs[0, 0].item())
            return super().loss(inputs, targets)

    total(likelihood(Model(), np.arange(10, dtype=np.uint8), context=4, stride=2, batch_tokens=4))
    assert seen[0] == 256
    assert seen[1] == 1  # the second window starts at token 2, after token 1


@pytest.mark.parametrize(("context", "stride"), [(4, 5), (4, 0), (0, 0)])
def test_an_impossible_window_is_refused(context, stride):
    with pytest.raises(ValueError, match=f"stride={stride}, context={context}"):
        list(sliding_windows(10, context, stride))


def test_bits_per_byte_of_a_uniform_guess_is_eight():
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8)
    with pytest.raises(ValueError, match="num_bytes=0"):
        bits_per_byte(1.0, 0)
