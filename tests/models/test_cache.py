"""The cache of decoding: what it keeps, and that nothing visible is ever missing from it."""

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from data.batches.batch import number_documents
from evaluation.generation import generate
from kernels.patterns import (
    causal,
    dilated,
    fixed,
    global_tokens,
    others,
    per_head,
    random_blocks,
    strided,
    window,
)
from kernels.patterns.retention import cache_plan, last_queries
from models.cache import Cache, LayerCache
from models.cache.key_value import KeyValueCache
from tests.kernels.patterns.test_patterns import patterns
from tests.kernels.patterns.test_tiles import Largest
from tests.support.configs import SMALL, composed
from tests.support.oracle import dense_attention, dense_mask

SUB_BLOCKS = per_head(*(fixed(16, 4, sub_block=s) for s in range(4)))


@settings(max_examples=250)
@given(patterns, st.integers(1, 150), st.integers(1, 3))
def test_the_last_query_is_that_of_the_dense_mask(pattern, length, heads):
    seen = dense_mask(pattern, length, heads)[0]
    query = torch.arange(length)[:, None]
    assert torch.equal(
        last_queries(pattern, heads, length), torch.where(seen, query, -1).amax(dim=1)
    )


def test_the_last_query_is_found_over_many_tiles():
    pattern = causal() & per_head(
        fixed(100, 7, sub_block=3) & others(), window(300) & strided(7), random_blocks(1, block=5)
    )
    seen = dense_mask(pattern, 1001, 3)[0]
    query = torch.arange(1001)[:, None]
    assert torch.equal(last_queries(pattern, 3, 1001), torch.where(seen, query, -1).amax(dim=1))


@settings(max_examples=250)
@given(patterns, st.integers(1, 150), st.integers(1, 3), st.integers(0, 149))
def test_every_query_finds_each_key_that_it_sees_in_a_slot_of_its_own(
    pattern, length, heads, tokens
):
    pattern = causal() & pattern
    tokens = min(tokens, length)
    plan = cache_plan(pattern, heads, length)
    mask = dense_mask(pattern, length, heads)[0]
    content = torch.full((heads, int(plan.kept.max())), -1)
    head, key = plan.held(tokens)
    content[head, plan.slot[head, key]] = key
    for i, (slot, seen) in enumerate(plan.steps(tokens, "cpu"), start=tokens):
        content[torch.arange(heads), slot] = i
        for h in range(heads):
            assert sorted(content[h, seen[h]].tolist()) == mask[h, i].nonzero()[:, 0].tolist()
        assert (slot < plan.kept).all()


def test_a_plan_takes_little_memory_where_heads_differ():
    pattern = causal() & (window(3, block=64) | global_tokens(128) | random_blocks(3, block=64))
    with Largest() as largest:
        cache_plan(pattern, 8, 12_288)
    assert largest.elements < 12_288**2 / 64


def most_kept(pattern, length, heads=1):
    return cache_plan(causal() & pattern, heads, length).kept.tolist()


def test_a_window_is_a_ring_of_its_width():
    plan = cache_plan(causal() & window(512), 1, 12_288)
    assert plan.kept.tolist() == [512]
    assert torch.equal(plan.slot[0], torch.arange(12_288) % 512)
    assert most_kept(window(512), 100) == [100]


@pytest.mark.parametrize(("n", "kept"), [(12_288, 3_200), (65_536, 16_512)])
def test_fixed_keeps_a_block_and_the_summary_cells_of_those_before_it(n, kept):
    assert most_kept(fixed(128, 32), n + 128) == [kept] == [128 + 32 * n // 128]
    assert most_kept(fixed(128, 32), n) == [kept - 32]  # the last block is not before itself


def test_each_head_keeps_what_its_own_pattern_reaches():
    assert most_kept(SUB_BLOCKS, 256, heads=4) == [16 + 4 * 15] * 4
    assert most_kept(per_head(window(8), dilated(8, 3)), 256, heads=4) == [8, 22, 8, 22]
    assert most_kept(per_head(window(8), window(8) | global_tokens(3)), 256, heads=2) == [8, 11]


def test_a_column_is_reachable_to_its_end():
    # Only the last query of each residue ends a column, so nothing leaves before the last stride.
    assert most_kept(window(16) | strided(16), 256) == [256 - 16 + 1]
    assert most_kept(causal(), 256) == [256]


def test_a_random_block_is_kept_until_the_last_query_that_drew_it():
    kept = most_kept(window(3, block=4) | random_blocks(1, block=4), 1024, heads=3)
    assert all(12 < n < 700 for n in kept)
    assert len(set(kept)) > 1


def test_a_query_that_may_see_the_future_is_refused():
    with pytest.raises(ValueError, match=r"needs a causal pattern, got window\(2, 2\)"):
        cache_plan(window(2, 2), 1, 8)


CACHED = [
    causal(),
    causal() & window(12),
    causal() & (window(2, block=8) | global_tokens(16) | random_blocks(2, block=8)),
    causal() & (window(16) | strided(16)),
    causal() & fixed(16, 4),
    causal() & SUB_BLOCKS,
    per_head(dilated(8, 1), dilated(8, 3)),
    causal() & others() & window(9),  # the first query sees nothing
]


@pytest.mark.parametrize("pattern", CACHED, ids=repr)
@pytest.mark.parametrize("first", [1, 37])
def test_decoding_equals_attention_to_all_tokens(pattern, first, device):
    length, heads = 65, 4
    q, k = torch.randn(2, 2, heads, length, 16, device=device)
    v = torch.randn(2, heads, length, 24, device=device)
    wanted, _ = dense_attention(q, k, v, dense_mask(pattern, length, heads, device))
    layer = KeyValueCache(pattern, heads, length)
    cache = Cache([layer])
    layer.fill(k[:, :, :first], v[:, :, :first])
    cache.start(first, device)
    for i in range(first, length):
        cache.advance()
        for _ in range(2):  # the same token again changes nothing
            out = layer.step(*(x[:, :, i : i + 1] for x in (q, k, v)))
            torch.testing.assert_close(out[:, :, 0], wanted[:, :, i], rtol=1e-5, atol=1e-5)
        assert cache.position == i
    assert layer.keys.shape[2] == max(most_kept(pattern, length, heads))


class Counting(LayerCache):
    """Changes some tensors with each token."""

    def __init__(self, *kept):
        self.tokens, self.kept = 3, kept

    def fill(self):
        pass

    def step(self):
        return self.kept[0]

    def advance(self):
        return [(tensor, tensor + 1) for tensor in self.kept]


def test_layers_of_all_kinds_advance_together_with_one_launch_a_dtype(monkeypatch):
    calls, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *args: calls.append(args) or copy(*args))
    layers = [Counting(torch.zeros(2), torch.zeros(1, dtype=torch.long)), Counting(torch.zeros(3))]
    places = [tensor.data_ptr() for layer in layers for tensor in layer.kept]
    cache = Cache(layers)
    cache.start(3, torch.device("cpu"))
    for n in (1, 2):
        cache.advance()
        assert cache.position == 2 + n
        kept = [tensor for layer in layers for tensor in layer.kept]
        assert all((tensor == n).all() for tensor in kept)
        assert [tensor.data_ptr() for tensor in kept] == places
    assert len(calls) == 2 * 2


def test_a_layer_that_kept_other_tokens_than_the_pass_had_is_refused():
    with pytest.raises(RuntimeError, match="layer 1 did not fill its Counting with the 5 tokens"):
        Cache([Counting(torch.zeros(1))]).start(5, torch.device("cpu"))


# ------------------------------------------------------------------------------------- models

FAMILIES = [
    ["model=dense"],
    ["model=dense", "model.rotary_base=null", "model.embedding.matrix_shape=[5,20]"],
    ["model=bigbird", "model.attention.bigbird.block=8"],
    ["model=longformer", "model.attention.longformer={window: [8, 16], dilation: 3}"],
    ["model=longformer", "model.attention.longformer={window: 16, global_tokens: 3}"],
    ["model=sparse_transformer", "model.attention.sparse_transformer={stride: 16, cells: 4}"],
    [
        "model=sparse_transformer",
        "model.attention.sparse_transformer={stride: 16, kind: strided, use: merged}",
        "model.rotary_base=null",
        "+model.attention.sparse_transformer.projections={_target_: "
        "models.attention.projections.Projections, _partial_: true, qk_dim: 16}",
    ],
    [
        "model=sparse_transformer",
        "model.attention.sparse_transformer={stride: 16, cells: 4, use: heads}",
    ],
    [
        "model=bigbird",
        "model.attention.bigbird.block=8",
        "+model.attention.last={_target_: models.attention.pattern.PatternAttention, "
        "_partial_: true, pattern: 'causal() & window(12)'}",
        "model.layout=[bigbird,last]",
    ],
]


def build(*overrides: str):
    """A model that has learned nothing but does something: no matrix of it is zero."""
    model = instantiate(composed(*SMALL, "model.heads=4", *overrides).model).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def predicted(model, tokens, first: int, cache=None):
    """Logits after ``tokens[:, :first]`` and each one that follows, from a cache."""
    cache = model.cache(tokens.shape[1]) if cache is None else cache
    yield model.next_logits(tokens[:, :first], cache)
    for n in range(first, tokens.shape[1]):
        cache.advance()
        yield model.next_logits(tokens[:, n : n + 1], cache)


@torch.no_grad()
@pytest.mark.parametrize("overrides", FAMILIES, ids=" ".join)
@pytest.mark.parametrize("first", [1, 23])
def test_cached_predictions_are_those_of_the_whole_text(overrides, first, device):
    model = build(*overrides).to(device)
    tokens = torch.randint(256, (2, 75), device=device)
    tokens[:, 0] = 256  # the start id
    wanted = model(tokens)[:, first - 1 :]
    found = torch.stack(list(predicted(model, tokens, first)), dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("overrides", FAMILIES, ids=" ".join)
@pytest.mark.parametrize("border", [0, 5, 22])
def test_cached_predictions_are_those_of_the_last_of_several_documents(overrides, border, device):
    model = build(*overrides).to(device)
    tokens = torch.randint(256, (2, 75), device=device)
    tokens[:, [0, 3, border]] = 256  # start ids
    documents = number_documents(tokens, 256)
    cache = model.cache(75)
    found = [model.next_logits(tokens[:, :23], cache, documents[:, :23])]
    for n in range(23, 75):
        cache.advance()
        found.append(model.next_logits(tokens[:, n : n + 1], cache))
    wanted = model(tokens, documents)[:, 22:]
    torch.testing.assert_close(torch.stack(found, dim=1), wanted, rtol=1e-5, atol=1e-5)


def test_rows_whose_last_documents_begin_at_different_tokens_need_caches_of_their_own():
    model = build("model=dense")
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"at the same token, got \[1, 2\]"):
        model.next_logits(torch.zeros_like(documents), model.cache(9), documents)


@torch.no_grad()
@pytest.mark.parametrize("overrides", FAMILIES, ids=" ".join)
def test_a_pass_that_is_recorded_once_serves_every_later_token(overrides):
    """As a CUDA graph does: always the same operations, on the same memory."""
    model = build(*overrides)
    tokens = torch.randint(256, (2, 75))
    cache = model.cache(75)
    model.next_logits(tokens[:, :23], cache)
    cache.advance()
    recorded = make_fx(lambda token: model.next_logits(token, cache))(tokens[:, 23:24])
    found = [recorded(tokens[:, 23:24])]
    for n in range(24, 75):
        cache.advance()
        found.append(recorded(tokens[:, n : n + 1]))
    wanted = model(tokens)[:, 23:]
    torch.testing.assert_close(torch.stack(found, dim=1), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [0, 1, 40])
def test_a_cached_text_is_the_one_that_reading_it_all_again_gives(prompt, device):
    model = build("model=bigbird", "model.attention.bigbird.block=8").to(device)
    prompt = torch.randint(256, (2, prompt), device=device)
    text = generate(model, prompt, 30, temperature=0)
    sequence = torch.cat((torch.full_like(text[:, :1], 256), text), dim=1)
    with torch.inference_mode():
        wanted = model(sequence)[:, prompt.shape[1] : -1].argmax(dim=-1)
    assert torch.equal(text[:, prompt.shape[1] :], wanted)


def test_half_precision_is_cached_in_half_precision(device):
    model = build("model=longformer", "model.attention.longformer.window=16").to(device)
    tokens = torch.randint(256, (1, 50), device=device)
    with torch.no_grad():
        wanted = model(tokens)[:, 9:]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            cache = model.cache(50)
            found = list(predicted(model, tokens, 10, cache))
    layer = cache.layers[0]
    assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
    assert layer.keys.shape == (1, 4, 16, 8)
    found = torch.stack(found, dim=1).float()
    assert (found - wanted).norm() / wanted.norm() < 0.03


def test_a_model_that_cannot_go_so_far_is_refused_before_it_begins():
    prompt = torch.zeros(1, 10, dtype=torch.long)
    raster = build("model=dense", "model.rotary_base=null", "model.embedding.matrix_shape=[5,4]")
    assert generate(raster, prompt, 10).shape == (1, 20)
    assert generate(raster, prompt, 25, context=20).shape == (1, 35)
    with pytest.raises(ValueError, match=r"learned positions reach 20 tokens \(5, 4\), got 35"):
        generate(raster, prompt, 25)
    with pytest.raises(ValueError, match=r"needs a causal pattern, got full\(\)"):
        generate(build("model=dense", "model.attention.dense.causal=false"), prompt, 1)
