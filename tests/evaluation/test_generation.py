"""Sampling: what is drawn, and what it depends on."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from evaluation import generation
from evaluation.generation import generate, sample
from tests.models.test_cache import build


class Counter(nn.Module):
    """Predicts the next number with certainty; the start id is followed by 0."""

    vocab_size = 10

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.caches, self.passes, self.advances = [], [], 0

    def cache(self, length):
        self.caches.append(length)
        return self

    def advance(self):
        self.advances += 1

    def next_logits(self, tokens, cache):
        self.passes.append(tokens.shape[1])
        return self(tokens[:, -1])

    def forward(self, tokens):
        following = (tokens + 1) % (self.vocab_size + 1) % self.vocab_size
        return nn.functional.one_hot(following, self.vocab_size) * self.scale


def test_continues_the_prompt_and_keeps_it():
    text = generate(Counter(), torch.tensor([[3, 4]]), 8)
    assert text.tolist() == [[3, 4, 5, 6, 7, 8, 9, 0, 1, 2]]


def test_an_empty_prompt_starts_from_the_start_id():
    assert generate(Counter(), torch.empty(1, 0, dtype=torch.long), 3).tolist() == [[0, 1, 2]]


def test_the_prompt_is_read_at_once_and_each_token_by_itself():
    model = Counter()
    generate(model, torch.tensor([[3, 4, 5]]), 6)
    assert model.passes == [4, 1, 1, 1, 1, 1]  # the start id is one of the four
    assert model.caches == [9]  # nothing comes after the last token
    assert model.advances == 5


def test_beyond_the_context_it_starts_again_from_the_last_half():
    model = Counter()
    text = generate(model, torch.tensor([[3]]), 12, context=7).tolist()[0]
    assert text == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    assert model.caches == [7, 7, 5]
    assert model.passes == [2, 1, 1, 1, 1, 1, 4, 1, 1, 1, 4, 1]
    model = Counter()
    assert generate(model, torch.tensor([[3] * 300]), 3, context=100).tolist()[0][-3:] == [4, 5, 6]
    assert (model.caches, model.passes) == ([52], [50, 1, 1])
    assert generate(Counter(), torch.tensor([[3]]), 3, context=1).tolist() == [[3, 4, 5, 6]]


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
    assert sample(logits, 0, None, 1.0, None).tolist() == [1]
    draws = {int(sample(logits, 1.0, None, 0.9, None)) for _ in range(200)}
    assert draws == {1, 2}  # 0.69 + 0.25 of the probability


def test_top_k_draws_from_the_most_likely_and_top_p_from_what_it_leaves():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [3.0, 0.0, 1.0, 2.0]])
    generator = torch.Generator().manual_seed(0)

    def draws(top_k, top_p):
        drawn = [sample(logits, 1.0, top_k, top_p, generator) for _ in range(200)]
        return [set(row.tolist()) for row in torch.cat(drawn, dim=1)]

    assert draws(1, 1.0) == [{1}, {0}]
    assert draws(2, 1.0) == [{1, 2}, {0, 3}]
    assert draws(99, 1.0) == [{0, 1, 2, 3}] * 2
    # 0.64 and 0.24 of all are 0.73 and 0.27 of the two.
    assert draws(2, 0.7) == [{1}, {0}]
    assert draws(None, 0.7) == [{1, 2}, {0, 3}]


def test_the_same_generator_gives_the_same_text():
    def draw(seed):
        logits = torch.zeros(1000)
        return int(sample(logits, 1.0, None, 1.0, torch.Generator().manual_seed(seed)))

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"got .*{name}={value}"):
        generate(Counter(), torch.tensor([[1]]), 1, **setting)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_drawn_from_a_model_whose_weights_are_not_finite(temperature):
    model = Counter()
    model.scale.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"not finite.* lower `optimizer.lr`"):
        generate(model, torch.tensor([[1]]), 1, temperature=temperature)


def test_a_context_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        generate(Counter(), torch.tensor([[1]]), 1, context=0)


@pytest.mark.parametrize("token", [-1, 10])
def test_a_prompt_of_anything_but_tokens_is_refused(token):
    with pytest.raises(ValueError, match=f"tokens of 0 to 9, got {min(1, token)} to"):
        generate(Counter(), torch.tensor([[1, token]]), 1)


# ------------------------------------------------------------------------------------- graphs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs run on a GPU")
GRAPHED = [
    ["model=dense"],
    ["model=dense", "model.rotary_base=null", "model.embedding.matrix_shape=[10,10]"],
    ["model=bigbird", "model.attention.bigbird.block=8"],
    ["model=sparse_transformer", "model.attention.sparse_transformer={stride: 16, cells: 4}"],
]
PRECISIONS = {
    "float32": nullcontext,
    "autocast": lambda: torch.autocast("cuda", dtype=torch.bfloat16),
    "uncached": lambda: torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False),
}


def long_text(model, device):
    """A text that outgrows its context twice."""
    prompt = torch.arange(10, device=device).view(2, 5)
    generator = torch.Generator().manual_seed(0)
    return generate(model, prompt, 150, context=80, top_k=3, generator=generator)


@pytest.mark.parametrize("overrides", GRAPHED, ids=" ".join)
def test_each_cache_has_a_reader_of_its_own(overrides, monkeypatch):
    model = build(*overrides)
    wanted = long_text(model, "cpu")
    counts = []

    def record(model, cache, token, count):
        """What a graph is: the operations of one pass, on its memory."""
        counts.append(count)
        return make_fx(lambda token: model.next_logits(token, cache))(token)

    monkeypatch.setattr(generation, "_token_reader", record)
    assert torch.equal(long_text(model, "cpu"), wanted)
    assert counts == [80 - 6, 80 - 40, 34 - 1]  # the start id is one of the six


@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("overrides", GRAPHED, ids=" ".join)
def test_a_graph_predicts_what_eager_passes_do(overrides, precision):
    model = build(*overrides).cuda()
    tokens = torch.randint(256, (3, 90), device="cuda")
    eager, graphed = model.cache(90), model.cache(90)
    # Where gradients are off, autocast keeps casts of weights, and in inference mode it does not.
    with torch.no_grad(), PRECISIONS[precision]():
        for cache in (eager, graphed):
            model.next_logits(tokens[:, :20], cache)
        read = None
        for n in range(20, 90):
            token = tokens[:, n : n + 1]
            for cache in (eager, graphed):
                cache.advance()
            read = read or generation._TokenGraph(model, graphed, token)
            torch.testing.assert_close(read(token), model.next_logits(token, eager))


@needs_gpu
@pytest.mark.parametrize("overrides", GRAPHED, ids=" ".join)
def test_a_graph_writes_the_text_of_eager_passes(overrides, monkeypatch):
    model = build(*overrides).cuda()
    for block in model.blocks:
        block.compile()  # as in training
    graphs, graph = [], generation._TokenGraph
    monkeypatch.setattr(generation, "_TokenGraph", lambda *args: graphs.append(1) or graph(*args))
    found = long_text(model, "cuda")
    assert len(graphs) == 3
    monkeypatch.setattr(generation, "_GRAPH_TOKENS", 1_000)
    assert torch.equal(long_text(model, "cuda"), found)
    assert len(graphs) == 3


@needs_gpu
def test_a_graph_gives_its_memory_back():
    model = build("model=dense").cuda()
    prompt = torch.randint(256, (2, 5), device="cuda")
    used = []
    for _ in range(4):
        generate(model, prompt, 40)
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_reserved())
    assert used[3] <= used[1]  # the first one sets up what stays
