"""`attend` against dense float64 attention, forward and every gradient, and its contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attend import attend, merge
from kernels.patterns import causal, full, global_tokens, random_blocks, window
from kernels.patterns.tiles import TileList
from tests.support.oracle import assert_as_exact_as_torch, dense_attention, dense_mask, gradients

BIGBIRD = causal() & (window(3, block=8) | global_tokens(16) | random_blocks(2, block=8))
PATTERNS = {
    "causal": causal(),
    "full": full(),
    "window": causal() & window(20),
    "longformer": window(9, 9) | global_tokens(3),
    "bigbird": BIGBIRD,
    "bigbird-bidirectional": window(1, 1, block=8) | global_tokens(8) | random_blocks(1, block=8),
}


def inputs(B=2, Hq=4, Hkv=2, L=77, D=16, Dv=24, dtype=torch.float32, device="cpu", Lk=None):
    """q, k, v as models make them: views of (B, L, H, D) memory."""
    shapes = [(B, L, Hq, D), (B, Lk or L, Hkv, D), (B, Lk or L, Hkv, Dv)]
    return [torch.randn(s, device=device).to(dtype).transpose(1, 2) for s in shapes]


def cotangents(q, v):
    out = torch.randn(*q.shape[:3], v.shape[3], device=q.device)
    return [out, torch.randn(q.shape[:3], device=q.device)]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("length", [1, 17, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outputs_and_gradients_are_as_exact_as_torch(name, length, dtype, device):
    pattern = PATTERNS[name]
    q, k, v = inputs(L=length, dtype=dtype, device=device)
    mask = dense_mask(pattern, length, 4, device)
    assert_as_exact_as_torch(
        lambda *x: attend(*x, pattern),
        lambda *x: dense_attention(*x, mask),
        [q, k, v],
        cotangents(q, v),
    )


@settings(max_examples=30)
@given(
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3)]),
    length=st.integers(1, 150),
    sizes=st.tuples(st.sampled_from([1, 8, 40]), st.sampled_from([1, 16, 33])),
    name=st.sampled_from(sorted(PATTERNS)),
)
def test_any_shape_in_float64(heads, length, sizes, name):
    q, k, v = inputs(1, *heads, length, *sizes, dtype=torch.float64)
    mask = dense_mask(PATTERNS[name], length, heads[0])
    assert_as_exact_as_torch(
        lambda *x: attend(*x, PATTERNS[name], scale=0.3),
        lambda *x: dense_attention(*x, mask, scale=0.3),
        [q, k, v],
        cotangents(q, v),
    )


def test_gradients_match_finite_differences():
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 1, 9, 3, 2, dtype=torch.float64))
    pattern = causal() & window(4)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, pattern), (q, k, v))


def test_queries_and_keys_may_differ_in_number(device):
    q, k, v = inputs(L=40, Lk=90, device=device)
    mask = full().dense(90, device=device)[:40]
    assert_as_exact_as_torch(
        lambda *x: attend(*x, full()), lambda *x: dense_attention(*x, mask), [q, k, v],
        cotangents(q, v),
    )  # fmt: skip


def test_a_query_without_a_visible_key_gives_zero_and_no_gradient(device):
    q, k, v = (x.requires_grad_() for x in inputs(L=30, device=device))
    position = torch.zeros(1, 1, 30, dtype=torch.int32, device=device)
    tiles = TileList.from_layout(torch.ones(1, 1, 1, dtype=torch.bool, device=device), (32, 32))
    # Every query stands at 0, every key later: causal shows nothing.
    out, lse = attend(q, k, v, causal(), q_position=position, k_position=position + 5, tiles=tiles)
    assert out.eq(0).all()
    assert torch.isneginf(lse).all()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad.eq(0).all()


def test_documents_equal_separate_calls(device):
    q, k, v = inputs(B=1, L=100, device=device)
    lengths = [33, 1, 66]
    documents = torch.arange(3, device=device).repeat_interleave(
        torch.tensor(lengths, device=device)
    )
    packed, packed_lse = attend(q, k, v, causal(), documents=documents[None])
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    separate = [attend(*part, causal()) for part in parts]
    torch.testing.assert_close(packed, torch.cat([out for out, _ in separate], dim=2))
    torch.testing.assert_close(packed_lse, torch.cat([lse for _, lse in separate], dim=2))


def test_permuted_tokens_with_positions_equal_the_original_order(device):
    q, k, v = inputs(L=64, device=device)
    order = torch.randperm(64, device=device)
    tiles = TileList.from_layout(torch.ones(1, 4, 4, dtype=torch.bool), (16, 16))
    position = order.int()[None, None]
    moved, _ = attend(
        *(x[:, :, order] for x in (q, k, v)), causal() & window(9),
        q_position=position, k_position=position, tiles=tiles,
    )  # fmt: skip
    expected, _ = attend(q, k, v, causal() & window(9))
    torch.testing.assert_close(moved, expected[:, :, order])


def test_nothing_outside_the_tiles_is_visible(device):
    q, k, v = inputs(L=64, device=device)
    layout = torch.rand(4, 4, 4) < 0.5
    position = torch.arange(64, device=device)[None, None]
    tiles = TileList.from_layout(layout, (16, 16))
    assert len(tiles) == int(layout.sum())
    actual = attend(q, k, v, causal(), q_position=position, k_position=position, tiles=tiles)
    mask = layout.repeat_interleave(16, 1).repeat_interleave(16, 2).to(device)
    expected = dense_attention(q, k, v, mask[None] & causal().dense(64, device=device))
    torch.testing.assert_close(actual, expected)


def test_a_later_token_never_changes_an_earlier_row_bitwise(device):
    q, k, v = inputs(L=90, device=device)
    before, _ = attend(q, k, v, BIGBIRD)
    for x in (q, k, v):
        x[:, :, 50:] = torch.randn_like(x[:, :, 50:]) * 1e3
    after, _ = attend(q, k, v, BIGBIRD)
    assert torch.equal(before[:, :, :50], after[:, :, :50])


def test_backward_is_equal_from_run_to_run(device):
    q, k, v = (x.requires_grad_() for x in inputs(L=130, device=device))
    grads = [torch.autograd.grad(attend(q, k, v, BIGBIRD)[0].sum(), (q, k, v)) for _ in range(10)]
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_merging_disjoint_keys_equals_one_call_with_gradients(device):
    q, k, v = inputs(L=70, device=device, dtype=torch.float64)
    near, far = causal() & window(8), global_tokens(5)
    # Keys of the window and the rest of the causal triangle, in two storage halves of the mask.
    position = torch.arange(70, device=device)[None, None]
    halves = torch.zeros(2, 1, 1, 10, dtype=torch.bool)
    halves[0, ..., :4], halves[1, ..., 4:] = True, True

    def merged(*x):
        tiles = [TileList.from_layout(half, (70, 7)) for half in halves]
        moved = {"q_position": position, "k_position": position}
        return merge(*(attend(*x, near | far, tiles=part, **moved) for part in tiles))

    mask = dense_mask(near | far, 70, 4, device)
    assert_as_exact_as_torch(
        merged, lambda *x: dense_attention(*x, mask), [q, k, v], cotangents(q, v)
    )


def test_merge_of_nothing_is_nothing():
    out, lse = torch.zeros(1, 1, 3, 2), torch.full((1, 1, 3), float("-inf"))
    lse.requires_grad_()
    merged, total = merge((out, lse), (out, lse))
    assert merged.eq(0).all()
    assert torch.isneginf(total).all()
    merged.sum().backward()
    assert lse.grad.eq(0).all()


def test_out_dtype_is_what_was_asked_for():
    q, k, v = inputs(L=8, dtype=torch.bfloat16)
    assert attend(q, k, v, causal())[0].dtype == torch.bfloat16
    out, lse = attend(q, k, v, causal(), out_dtype=torch.float32)
    assert out.dtype == lse.dtype == torch.float32


def test_memory_of_the_backward_pass_does_not_grow_with_the_square_of_the_length():
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    q, k, v = (x.requires_grad_() for x in inputs(1, 1, 1, 512, 8, 8))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend(q, k, v, causal())
    assert sum(saved) < 512 * 8 * 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 8)}, "must be"),
        ({"q": torch.zeros(1, 4, 8, 16)}, "must agree"),
        ({"k": torch.zeros(2, 3, 8, 16), "v": torch.zeros(2, 3, 8, 16)}, "4 and 3"),
        ({"q": torch.zeros(2, 4, 8, 16, dtype=torch.bfloat16)}, "torch.bfloat16"),
        ({"k": torch.zeros(2, 4, 0, 16), "v": torch.zeros(2, 4, 0, 16)}, "empty"),
        ({"documents": torch.zeros(2, 9).int()}, r"\(2, 9\)"),
        ({"documents": torch.zeros(2, 8)}, "torch.float32"),
        ({"documents": [[0] * 8] * 2}, "list"),
        ({"documents": torch.zeros(2, 8, dtype=torch.int32, device="meta")}, "meta"),
        ({"q_position": torch.zeros(1, 1, 8).int()}, "needs `tiles`"),
        ({"q_position": torch.zeros(1, 1, 7).int()}, r"\(1, 1, 7\)"),
        ({"tiles": torch.ones(1, 1)}, "TileList"),
        ({"scale": float("inf")}, "finite"),
        ({"out_dtype": torch.int32}, "torch.int32"),
        ({"q": torch.zeros(1, 1, 1, 1).expand(2, 4, 2**31, 16)}, "2\\*\\*31"),
        ({"implementation": "fast"}, "'fast'"),
        ({"pattern": "causal()"}, "parse"),
    ],
)
def test_bad_arguments_get_one_sentence(change, message):
    arguments = {name: torch.zeros(2, 4, 8, 16) for name in "qkv"} | change
    with pytest.raises(ValueError, match=message) as caught:
        attend(**{"pattern": causal()} | arguments)
    assert "\n" not in str(caught.value)


def test_one_query_far_along_sees_what_its_row_of_the_whole_sees(device):
    q, k, v = inputs(L=200, device=device)
    expected, _ = attend(q, k, v, BIGBIRD)
    tiles = TileList.from_layout(torch.ones(1, 1, 2, dtype=torch.bool, device=device), (16, 128))
    position = torch.full((1, 1, 1), 150, dtype=torch.int32, device=device)
    out, _ = attend(q[:, :, 150:151], k, v, BIGBIRD, q_position=position, tiles=tiles)
    torch.testing.assert_close(out, expected[:, :, 150:151])


def test_what_no_query_of_a_chunk_sees_never_leaks_not_even_nan(device):
    q, k, v = inputs(B=1, L=300, device=device)
    expected = gradients(lambda *x: attend(*x, BIGBIRD), [q, k, v], *cotangents(q, v))
    torch.manual_seed(1)
    documents = (torch.arange(300, device=device) >= 256).int()[None]
    clean, _ = attend(q, k, v, causal(), documents=documents)
    for x in (k, v):
        x[:, :, :256] = float("nan")
    spoiled, _ = attend(q, k, v, causal(), documents=documents)
    assert torch.equal(spoiled[:, :, 256:], clean[:, :, 256:])
    assert all(x.isfinite().all() for x in expected)


def test_an_unseen_huge_value_changes_no_gradient(device):
    q, k, v = inputs(B=1, L=8, device=device)
    grads = []
    for value in (1.0, 3e38):
        v[:, :, 7] = value
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = attend(*leaves, causal())
        grads.append(torch.autograd.grad(out[:, :, :7].sum() * 10, leaves))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a[:, :, :7], b[:, :, :7])


def test_under_autocast_inputs_are_cast_as_it_says(device):
    q, k, v = inputs(L=40, device=device)
    cast = [x.to(torch.bfloat16) for x in (q, k, v)]
    expected = gradients(lambda *x: attend(*x, BIGBIRD), cast, *cotangents(q, v))
    torch.manual_seed(1)

    def under_autocast(q, k, v):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return attend(q, k.bfloat16(), v, BIGBIRD)  # of mixed dtypes

    torch.manual_seed(0)
    inputs(L=40, device=device)  # so that the same cotangents are drawn
    actual = gradients(under_autocast, [q, k, v], *cotangents(q, v))
    assert actual[0].dtype == torch.bfloat16
    assert actual[2].dtype == torch.float32
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.to(b.dtype), b)
