"""Sampling: what is drawn, and what it depends on."""

import pytest
import torch
from torch import nn

from evaluation.generation import generate, sample


class Counter(nn.Module):
    """Predicts the next number with certainty; the start id is followed by 0."""

    vocab_size = 10

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.lengths = []

    def forward(self, tokens):
        self.lengths.append(tokens.shape[1])
        following = (tokens + 1) % (self.vocab_size + 1) % self.vocab_size
        return nn.functional.one_hot(following, self.vocab_size) * self.scale


def test_continues_the_prompt_and_keeps_it():
    text = generate(Counter(), torch.tensor([[3, 4]]), 8)
    assert text.tolist() == [[3, 4, 5, 6, 7, 8, 9, 0, 1, 2]]


def test_an_empty_prompt_starts_from_the_start_id():
    assert generate(Counter(), torch.empty(1, 0, dtype=torch.long), 3).tolist() == [[0, 1, 2]]


def test_looks_back_at_most_the_context():
    model = Counter()
    assert generate(model, torch.tensor([[3] * 300]), 3, context=100).tolist()[0][-3:] == [4, 5, 6]
    assert max(model.lengths) == 100


def test_lengths_are_padded_so_that_few_differ_within_the_context():
    model = Counter()
    generate(model, torch.tensor([[3]]), 150, context=200)
    assert set(model.lengths) == {128, 200}


def test_each_prompt_of_a_batch_is_continued_by_itself():
    text = generate(Counter(), torch.tensor([[3, 4], [7, 8]]), 3, temperature=0)
    assert text.tolist() == [[3, 4, 5, 6, 7], [7, 8, 9, 0, 1]]
    assert generate(Counter(), torch.empty(2, 0, dtype=torch.long), 2).tolist() == [[0, 1], [0, 1]]


def test_a_compiled_model_is_not_compiled_again_for_every_length():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = Counter()
    model.compile(backend=backend)
    generate(model, torch.tensor([[3]]), 3)
    assert not compiled
    model(torch.tensor([[3]]))
    assert compiled


def test_temperature_zero_is_greedy_and_top_p_cuts_the_tail():
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert sample(logits, 0, 1.0, None).tolist() == [1]
    draws = {int(sample(logits, 1.0, 0.9, None)) for _ in range(200)}
    assert draws == {1, 2}  # 0.69 + 0.25 of the probability


def test_the_same_generator_gives_the_same_text():
    def draw(seed):
        logits = torch.zeros(1000)
        return int(sample(logits, 1.0, 1.0, torch.Generator().manual_seed(seed)))

    assert draw(1) == draw(1) != draw(2)


def test_impossible_sampling_is_refused():
    with pytest.raises(ValueError, match=r"-1\.0 and 1\.0"):
        generate(Counter(), torch.tensor([[1]]), 1, temperature=-1.0)
