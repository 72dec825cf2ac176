"""The Triton kernels of `attend` against dense float64 attention, forward and every gradient."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kernels.attend import attend, merge, passes, work
from kernels.attend.call import Call
from kernels.patterns import (
    block_diffusion,
    blocks,
    causal,
    dilated,
    fixed,
    full,
    global_at,
    global_tokens,
    near2d,
    near3d,
    others,
    per_head,
    random_blocks,
    strided,
    summary,
    tiles2d,
    tiles3d,
    window,
)  # fmt: skip
from kernels.patterns.tiles import TileList
from tests.kernels.attend.test_attend import cotangents, inputs
from tests.support.oracle import assert_as_exact_as_torch, dense_attention, dense_mask, gradients

fused = partial(attend, implementation="fused")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BIGBIRD = window(3, block=16) | global_tokens(16) | random_blocks(2, block=16)
PATTERNS = {
    "causal": causal(),
    "full": full(),
    "window": causal() & window(50),
    "longformer": causal() & (window(30) | global_tokens(3)),
    "longformer-bidirectional": window(20, 9) | global_tokens(3),
    "bigbird": causal() & BIGBIRD,
    "bigbird-bidirectional": BIGBIRD,
    "strided": causal() & (window(12) | strided(12)),
    "strided-alone": causal() & strided(7) & others(),
    "dilated": causal() & dilated(9, 5),
    "dilated-bidirectional": dilated(3, 2, 4) | window(1, 1),
    "fixed": causal() & fixed(24, 8),
    "fixed-sub-block": causal() & fixed(24, 4, sub_block=2),
    "fixed-one-cell": causal() & fixed(24, 1),
    "summary": causal() & summary(24, 8),  # rows without a key, keys without a query
    "summary-in-some-heads": causal() & per_head(window(5), summary(24, 8, sub_block=1)),
    "blocks": causal() & blocks("x..../xx.../.xx../x.xx./xx..x", block=40),
    "picture": near2d(7, 9, 2, channels=3),
    "picture-causal": causal() & near2d(7, 9, (1, 2), channels=3),
    "picture-beside-text": near2d(7, 9, 1) | causal() & window(9),
    "picture-tiles": tiles2d(12, 16, (4, 3), (1, 0)),
    "video": near3d(3, 7, 9, 1) | tiles3d(3, 7, 9, 3, 0),
    "block-diffusion": block_diffusion(12, 90),
    "global-at": causal() & (window(9) | global_at(3, 31, 40, 130)),
    "global-at-bidirectional": window(9, 9) | global_at(3, 31, 40, 130),
    "global-at-alone": global_at(*range(0, 300, 7)),  # nothing covers all queries at the end
    "global-at-in-some-heads": causal() & per_head(window(9), strided(7) | global_at(0, 12, 99)),
    "heads-differ-in-number": causal() & per_head(window(5), window(90)),
    "heads-differ-in-kind": causal() & per_head(window(5), dilated(6, 4), strided(9), fixed(16, 4)),
}


def assert_exact(pattern, q, k, v, mask=None, **options):
    mask = dense_mask(pattern, q.shape[2], q.shape[1], q.device) if mask is None else mask
    assert_as_exact_as_torch(
        lambda *x: fused(*x, pattern, **options),
        lambda *x: dense_attention(*x, mask, options.get("scale")),
        [q, k, v],
        cotangents(q, v),
    )


MOVED = [
    name
    for name in PATTERNS
    if name.startswith(("strided", "dilated", "fixed", "summary", "global"))
]


# 288 tokens are whole blocks of every stride: there tiles of 16 bits come through descriptors.
@pytest.mark.parametrize(
    ("name", "length", "dtype"),
    [
        *((name, length, torch.float32) for name in PATTERNS for length in (17, 190)),
        *((name, 288, torch.float16) for name in MOVED),
    ],
)
def test_every_pattern_is_as_exact_as_torch(name, length, dtype):
    sizes = {"B": 1, "L": length, "Hq": 4, "Hkv": 4, "D": 16, "Dv": 16}
    assert_exact(PATTERNS[name], *inputs(**sizes, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize(
    "pattern",
    [
        causal() & (window(2**31 - 1, block=2**31 - 1) & dilated(2**31 - 1, 3)),
        dilated(2**31 - 1, 2**31 - 1, 2) & window(2**31 - 1, 7),
        causal() & (strided(2**31 - 1) | dilated(50_000, 70_000) | fixed(2**31 - 1, 2**30)),
    ],
)
def test_the_largest_sizes_are_as_exact_as_torch(pattern):
    assert_exact(pattern, *inputs(B=1, L=70, Hq=1, Hkv=1, D=16, Dv=16, device=DEVICE))


@pytest.fixture
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", MOVED)
def test_every_gradient_is_written(name, nan_in_new_memory):
    q, k, v = inputs(B=1, L=70, Hq=4, Hkv=4, D=16, Dv=16, device=DEVICE)
    results = gradients(lambda *x: fused(*x, PATTERNS[name]), [q, k, v], *cotangents(q, v))
    for gradient in results[2:]:
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (80, 80), (32, 128), (96, 48), (256, 192)])
def test_every_dtype_and_head_size_is_as_exact_as_torch(dtype, sizes):
    q, k, v = inputs(B=1, Hq=2, Hkv=1, L=130, D=sizes[0], Dv=sizes[1], dtype=dtype, device=DEVICE)
    assert_exact(causal() & (window(40) | global_tokens(3)), q, k, v)


@settings(max_examples=5)
@given(
    name=st.sampled_from(sorted(PATTERNS)),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3)]),
    length=st.integers(1, 150),
    sizes=st.tuples(st.sampled_from([1, 8, 40]), st.sampled_from([1, 16, 33])),
)
def test_any_shape(name, batch, heads, length, sizes):
    q, k, v = inputs(batch, *heads, length, *sizes, device=DEVICE)
    assert_exact(PATTERNS[name], q, k, v, scale=0.3)


@pytest.mark.parametrize(
    "pattern",
    [
        PATTERNS["bigbird"],
        PATTERNS["longformer-bidirectional"],
        causal() & (window(70) | strided(3)),
        causal() & fixed(100, 20),
        window(5, 5) | global_at(*range(0, 300, 11)),
    ],
)
def test_long_rows_and_columns_are_cut_into_parts_and_merged(pattern, monkeypatch):
    monkeypatch.setattr(work, "PART_TILES", 2)
    monkeypatch.setattr(work, "PART_ROWS", 0)
    work.work_of.cache_clear()
    q, k, v = inputs(B=1, L=300, Hq=2, Hkv=1, D=16, Dv=16, device=DEVICE)
    assert_exact(pattern, q, k, v)
    cut = [work_parts(pattern, 300, inverse) for inverse in (False, True)]
    work.work_of.cache_clear()
    assert min(cut) > 0, "the case must have rows and columns that are cut"


def work_parts(pattern, length, inverse) -> int:
    parts = [part for chain in passes.chains(pattern, 2) for part in chain]
    sizes = (2, length, length, (32, 32), inverse, torch.device("cpu"))
    return sum(work.work_of(part, *sizes).parts for part in parts)


@pytest.mark.parametrize("layout", ["B H L D", "B H D L", "qkv", "one key head for all"])
def test_any_strides(layout):
    q, k, v = inputs(B=2, Hq=2, Hkv=2, L=70, D=16, Dv=16, device=DEVICE)
    if layout == "B H L D":
        q, k, v = (x.contiguous() for x in (q, k, v))
    elif layout == "B H D L":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    elif layout == "qkv":
        q, k, v = torch.stack((q, k, v), dim=3).unbind(3)
    else:
        k, v = (x[:, :1].expand_as(x) for x in (k, v))
    assert_exact(PATTERNS["longformer"], q, k, v)


@pytest.mark.parametrize("name", PATTERNS)
def test_exactly_the_visible_keys_have_weight(name):
    # Values that are the rows of an identity make the output the matrix of weights.
    pattern, length = PATTERNS[name], 150
    q, k, _ = inputs(B=1, Hq=4, Hkv=4, L=length, D=16, device=DEVICE)
    weights = []
    for part in torch.eye(length, device=DEVICE).split(64, dim=1):
        v = part.expand(1, 4, length, part.shape[1])
        weights.append(fused(q * 0.1, k, v, pattern)[0])
    mask = dense_mask(pattern, length, 4, DEVICE)
    assert torch.equal(torch.cat(weights, dim=3) > 0, mask)


@pytest.mark.parametrize("lengths", [(1, 100), (40, 90), (90, 40), (100, 1)])
@pytest.mark.parametrize("name", ["full", "longformer", "bigbird", "strided", "fixed"])
def test_queries_and_keys_may_differ_in_number(name, lengths):
    q, k, v = inputs(B=1, L=lengths[0], Lk=lengths[1], device=DEVICE)
    mask = dense_mask(PATTERNS[name], max(lengths), 4, DEVICE)[:, :, : lengths[0], : lengths[1]]
    assert_exact(PATTERNS[name], q, k, v, mask)


def test_a_query_without_a_visible_key_gives_zero_and_no_gradient():
    q, k, v = (x.requires_grad_() for x in inputs(L=70, device=DEVICE))
    out, lse = fused(q, k, v, causal() & others())
    assert out[:, :, 0].eq(0).all()
    assert torch.isneginf(lse[:, :, 0]).all()
    assert lse[:, :, 1:].isfinite().all()
    grads = torch.autograd.grad(out.sum() + lse[:, :, 1:].sum(), (q, k, v))
    assert grads[0][:, :, 0].eq(0).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_permuted_tokens_with_positions_equal_the_original_order():
    q, k, v = inputs(L=96, device=DEVICE)
    order = torch.stack([torch.randperm(96, device=DEVICE) for _ in range(2)])
    moved = [torch.stack([x[b][:, order[b]] for b in range(2)]) for x in (q, k, v)]
    position = order.int()[:, None]
    tiles = TileList.from_layout(torch.ones(1, 6, 3, dtype=torch.bool, device=DEVICE), (16, 32))
    pattern = causal() & (window(20) | global_tokens(2))
    mask = dense_mask(pattern, 96, 4, DEVICE)
    mask = torch.stack([mask[0][:, order[b]][:, :, order[b]] for b in range(2)])
    assert_exact(
        pattern, *moved, mask, q_position=position, k_position=position, tiles=tiles
    )  # fmt: skip


def test_nothing_outside_the_tiles_is_visible():
    q, k, v = inputs(B=1, L=90, device=DEVICE)
    layout = torch.rand(4, 6, 3, device=DEVICE) < 0.5
    position = torch.arange(90, device=DEVICE, dtype=torch.int32)[None, None]
    tiles = TileList.from_layout(layout, (16, 32))
    mask = layout.repeat_interleave(16, 1).repeat_interleave(32, 2)[None, :, :90, :90]
    mask = mask & causal().dense(90, device=DEVICE)
    assert_exact(causal(), q, k, v, mask, q_position=position, k_position=position, tiles=tiles)


def test_merging_disjoint_keys_equals_one_call_with_gradients():
    q, k, v = inputs(B=1, L=130, device=DEVICE)

    def merged(*x):
        near = fused(*x, causal() & window(20), out_dtype=torch.float32)
        return merge(near, fused(*x, causal() & strided(20) & others()))

    mask = dense_mask(causal() & (window(20) | strided(20)), 130, 4, DEVICE)
    assert_as_exact_as_torch(
        merged, lambda *x: dense_attention(*x, mask), [q, k, v], cotangents(q, v)
    )


@pytest.mark.parametrize("name", ["bigbird", "strided", "fixed"])
def test_what_is_not_visible_changes_nothing_bitwise(name):
    q, k, v = inputs(B=1, L=190, device=DEVICE)
    before, before_lse = fused(q, k, v, PATTERNS[name])
    for x in (q, k, v):
        x[:, :, 130:] = torch.randn_like(x[:, :, 130:]) * 1e3
    after, after_lse = fused(q, k, v, PATTERNS[name])
    assert torch.equal(before[:, :, :130], after[:, :, :130])
    assert torch.equal(before_lse[:, :, :130], after_lse[:, :, :130])


def test_nan_in_dead_tiles_other_documents_and_padding_never_leaks():
    memory = torch.full((1, 400, 2, 16), float("nan"), device=DEVICE)
    q, k, v = (memory.clone().transpose(1, 2)[:, :, :300] for _ in range(3))
    documents = (torch.arange(300, device=DEVICE) >= 128).int()[None]
    for x in (q, k, v):
        x[:, :, 128:] = torch.randn(1, 2, 172, 16, device=DEVICE)
    out, lse = fused(q, k, v, causal() & window(30), documents=documents)
    assert out[:, :, 128:].isfinite().all()
    assert lse[:, :, 128:].isfinite().all()


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("place", "unreached"),
    [
        ("k", ["out", "lse", "dk", "dv"]),
        ("v", ["lse", "dv"]),
        ("q", ["out", "lse", "dq", "dv"]),
        ("dout", ["out", "lse", "dq", "dk"]),
    ],
)
def test_what_nan_and_infinity_do_not_reach_in_a_visited_tile(
    place, unreached, value, implementation
):
    q, k, v = inputs(B=1, Hq=1, Hkv=1, L=32, D=16, Dv=16, device=DEVICE)
    given = {"q": q, "k": k, "v": v, "dout": torch.randn_like(v)}
    # The last 16 tokens are keys that nobody sees, or queries that do not see the first keys.
    given[place][:, :, 20] = value
    pattern = blocks("x./x." if place in "kv" else "x./.x", block=16)
    leaves = [given[name].requires_grad_() for name in "qkv"]
    out, lse = attend(*leaves, pattern, implementation=implementation)
    grads = torch.autograd.grad((out, lse), leaves, (given["dout"], torch.ones_like(lse)))
    results = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
    tokens = slice(None) if place in "kv" else slice(16)
    for name in unreached:
        assert results[name][:, :, tokens].isfinite().all(), name


@pytest.mark.parametrize("name", ["bigbird", "longformer-bidirectional", "strided", "fixed"])
def test_backward_is_equal_from_run_to_run(name):
    q, k, v = (x.requires_grad_() for x in inputs(B=1, L=130, Hq=2, Hkv=1, device=DEVICE))
    runs = 1000 if DEVICE.type == "cuda" else 1
    out, _ = fused(q, k, v, PATTERNS[name])
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    for _ in range(runs):
        again = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_output_that_is_not_used_needs_no_gradient():
    q, k, v = (x.requires_grad_() for x in inputs(L=40, device=DEVICE))
    mask = dense_mask(causal(), 40, 4, DEVICE)
    for n in range(2):
        actual = torch.autograd.grad(
            fused(q, k, v, causal())[n].sum(), (q, k, v), allow_unused=True
        )
        plain = dense_attention(q, k, v, mask)[n].sum()
        expected = torch.autograd.grad(plain, (q, k, v), allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_fresh_thread_may_begin_with_attention():
    # Autograd's own thread may meet the driver for the first time here; memory is cached by then.
    q, k, v = inputs(L=64, device=DEVICE)
    expected = fused(q, k, v, causal())
    with ThreadPoolExecutor(1) as thread:
        actual = thread.submit(fused, q, k, v, causal()).result()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_out_dtype_is_what_was_asked_for():
    q, k, v = inputs(L=40, dtype=torch.bfloat16, device=DEVICE)
    assert_exact(causal(), q, k, v)
    out, lse = fused(q, k, v, causal(), out_dtype=torch.float32)
    assert out.dtype == lse.dtype == torch.float32
    assert not torch.equal(out, out.bfloat16().float())


@pytest.mark.skipif(DEVICE.type == "cpu", reason="65,600 programs take the interpreter a minute")
def test_more_than_65535_batches_and_heads():
    q, k, v = inputs(B=4100, Hq=16, Hkv=16, L=3, D=16, Dv=16, device=DEVICE)
    assert_exact(causal() & (window(2) | global_tokens(1)), q, k, v)


@pytest.mark.skipif(
    DEVICE.type == "cpu", reason="needs 18 GiB of memory, and a GPU to be done soon"
)
def test_tensors_of_more_than_2_to_the_31_elements():
    # The last heads of one buffer that q, k and v are views of: offsets do not fit in 32 bits.
    L, H, D = 65_536, 180, 64
    qkv = torch.randn(1, L, H, 3, D, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(3))
    assert qkv.numel() > 2**31
    pattern = causal() & (window(64) | global_tokens(16))
    out, lse = fused(q, k, v, pattern)
    alone, alone_lse = fused(*(x[:, -2:].contiguous() for x in (q, k, v)), pattern)
    assert torch.equal(out[:, -2:], alone)
    assert torch.equal(lse[:, -2:], alone_lse)


def test_the_operator_keeps_the_rules_of_torch():
    q, k, v = (
        x.requires_grad_() for x in inputs(B=1, Hq=2, Hkv=1, L=40, D=16, Dv=16, device=DEVICE)
    )
    with torch.device("meta"):  # a model may be made there
        call = Call(causal() & (window(5) | global_tokens(2)), 0.25, torch.float32).flatten()
    library.opcheck(torch.ops.strider.attend.default, (q, k, v, *call))


def test_a_compiled_model_has_one_graph_and_the_same_numbers():
    q, k, v = inputs(B=1, L=100, device=DEVICE)

    def loss(q, k, v):
        out, lse = fused(q * 2, k, v, causal() & (window(20) | global_tokens(2)))
        return (out * out).sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True)
    expected = gradients(lambda *x: (loss(*x),), [q, k, v], torch.ones((), device=DEVICE))
    actual = gradients(lambda *x: (compiled(*x),), [q, k, v], torch.ones((), device=DEVICE))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


TWO_SUMMARIES = (
    summary(8, 2) | summary(8, 2, sub_block=1),
    causal() & (summary(8, 2) | summary(12, 3)),
)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("pattern", TWO_SUMMARIES)
def test_keys_that_no_pass_covers_get_the_gradients_of_all_passes(pattern, kv_heads):
    q, k, v = inputs(B=1, L=40, Hq=2, Hkv=kv_heads, device=DEVICE)
    mask = dense_mask(pattern, 40, 2, DEVICE)
    assert_as_exact_as_torch(
        lambda *x: attend(*x, pattern, implementation="fused"),
        lambda *x: dense_attention(*x, mask),
        [q, k, v], cotangents(q, v),
    )  # fmt: skip
