"""The cache of decoding: what it keeps, and that nothing visible is ever missing from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from kernels.reach import cache_plan, last_queries
from models.attention.cache import KeyValueCache
from tests.oracle import dense_attention, dense_mask
from tests.test_patterns import patterns

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
    cache = KeyValueCache(pattern, heads, length)
    cache.fill(k[:, :, :first], v[:, :, :first])
    for i in range(first, length):
        out = cache.step(*(x[:, :, i : i + 1] for x in (q, k, v)))
        torch.testing.assert_close(out[:, :, 0], wanted[:, :, i], rtol=1e-5, atol=1e-5)
    assert cache.tokens == length
    assert cache.keys.shape[2] == max(most_kept(pattern, length, heads))
