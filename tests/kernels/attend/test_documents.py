"""Rows of several documents: what a pattern shows of each is what it shows of it alone."""

import pytest
import torch

from kernels.attend import attend, documents, setup, work
from kernels.attend.tuning import Config, forced
from kernels.patterns import (
    blocks,
    causal,
    dilated,
    fixed,
    full,
    global_tokens,
    per_head,
    prefix,
    random_blocks,
    strided,
    summary,
    window,
)  # fmt: skip
from kernels.patterns.tiles import TileList
from tests.kernels.attend.test_attend import cotangents, inputs
from tests.support.oracle import assert_as_exact_as_torch, dense_attention

PATTERNS = {
    "window": causal() & window(30),
    "dense": causal(),
    "dense-bidirectional": full(),
    "longformer": causal() & (window(20) | global_tokens(3)),
    "bigbird": causal() & (window(2, block=8) | global_tokens(8) | random_blocks(1, block=8)),
    "bigbird-bidirectional": window(1, 1, block=8) | global_tokens(20),
    "strided-and-global": causal() & (window(5) | strided(7) | global_tokens(4)),
    "fixed": causal() & fixed(24, 8),
    "summary": causal() & summary(24, 8),
    "prefix": prefix(9),
    "blocks": causal() & blocks("x..../xx.../.xx../x.xx./xx..x", block=20),
    "heads-differ": causal() & per_head(window(5), dilated(6, 4), fixed(16, 4)),
}
LENGTHS = [[1, 70, 2, 37, 30], [100, 20, 20]]


def numbered(lengths: list[list[int]], device) -> torch.Tensor:
    """Numbers of the documents of each row: any that do not decrease."""
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return (3 * torch.stack(rows) + 2).int().to(device)


def mask_of(pattern, lengths: list[list[int]], heads: int, device) -> torch.Tensor:
    """What every document shows alone, ``(B, heads, L, L)`` bool."""
    rows = []
    for row in lengths:
        alone = [[pattern.dense(n, head) for n in row] for head in range(heads)]
        rows.append(torch.stack([torch.block_diag(*parts).bool() for parts in alone]))
    return torch.stack(rows).to(device)


def assert_exact(pattern, lengths, implementation, device, dtype=torch.float32):
    q, k, v = inputs(
        B=2, L=sum(lengths[0]), Hq=4, Hkv=2, D=16, Dv=16, dtype=dtype, device=device
    )  # fmt: skip
    given = {"documents": numbered(lengths, device), "implementation": implementation}
    mask = mask_of(pattern, lengths, 4, device)
    assert_as_exact_as_torch(
        lambda *x: attend(*x, pattern, **given),
        lambda *x: dense_attention(*x, mask),
        [q, k, v],
        cotangents(q, v),
    )


@pytest.mark.parametrize("name", PATTERNS)
def test_reference_shows_each_document_what_it_sees_alone(name, device):
    assert_exact(PATTERNS[name], LENGTHS, "reference", device, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_short_documents_are_exact(name, kernel_device):
    assert_exact(PATTERNS[name], LENGTHS, "fused", kernel_device)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of which a document of 40 tokens has several, and rows of two tiles that are cut."""
    monkeypatch.setattr(work, "SHORT", 40)
    monkeypatch.setattr(work, "PART_TILES", 2)
    caches = (work.work_of, setup._planned)
    for cache in caches:
        cache.cache_clear()
    config = Config(32, 16, 4, 2)
    with forced(forward=config, dq=config, dkv=config):
        yield
    for cache in caches:
        cache.cache_clear()


QUICK = ("window", "bigbird", "fixed", "strided-and-global")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PATTERNS]
)
def test_long_documents_beside_short_ones_are_exact(name, small_tiles, kernel_device):
    assert_exact(PATTERNS[name], LENGTHS, "fused", kernel_device)


@pytest.mark.slow
def test_half_precision_takes_the_copy_engine_where_documents_begin_anywhere(
    small_tiles, kernel_device
):
    for name in ("bigbird", "fixed"):
        assert_exact(PATTERNS[name], [[141], [77, 64]], "fused", kernel_device, torch.float16)


@pytest.mark.parametrize("name", ["dense", "dense-bidirectional", "window"])
@pytest.mark.parametrize("large", ["v", "k"])
def test_large_numbers_of_the_next_document_make_no_nan(name, large, small_tiles, kernel_device):
    """Products of one document's numbers and the next one's overflow."""
    sizes = {"B": 1, "L": 96, "Hq": 1, "Hkv": 1, "D": 16, "Dv": 16}
    q, k, v = inputs(**sizes, dtype=torch.bfloat16, device=kernel_device)
    given = {"q": q, "k": k, "v": v, "dout": torch.randn_like(v)}
    other = {"v": "dout", "k": "q"}[large]
    given[large][:, :, :41] *= 1e20
    given[large][:, :, 41:] *= 1e-20
    given[other][:, :, :41] *= 1e-20
    given[other][:, :, 41:] *= 1e20
    leaves = [given[x].requires_grad_() for x in "qkv"]
    numbers = numbered([[41, 55]], kernel_device)
    out, _ = attend(*leaves, PATTERNS[name], documents=numbers, implementation="fused")
    for gradient in torch.autograd.grad(out, leaves, given["dout"]):
        assert not gradient.isnan().any()


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_any_change_of_the_number_begins_a_document(implementation, kernel_device):
    q, k, v = inputs(B=1, L=60, Hq=2, Hkv=1, D=16, Dv=16, device=kernel_device)
    lengths = [25, 20, 15]
    numbers = torch.tensor([7, 9, 0]).repeat_interleave(torch.tensor(lengths))  # padding is 0
    given = {"documents": numbers[None].to(kernel_device), "implementation": implementation}
    mask = mask_of(PATTERNS["longformer"], [lengths], 2, kernel_device)
    assert_as_exact_as_torch(
        lambda *x: attend(*x, PATTERNS["longformer"], **given),
        lambda *x: dense_attention(*x, mask),
        [q, k, v],
        cotangents(q, v),
    )


def test_every_token_has_one_program_whatever_the_documents(small_tiles, kernel_device):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        begins = torch.rand(2, 300, generator=generator) < torch.rand((), generator=generator) ** 4
        numbers = begins.cumsum(dim=1).int().to(kernel_device)
        starts = documents.first_tokens_of(numbers)
        q = torch.zeros(2, 1, 300, 16, device=kernel_device)
        call = setup.Call(full(), 1.0, torch.float32, numbers)
        (chain,) = setup.chains_of(full(), 1, 300, 300, False, True)
        made = setup.setup_of(chain[0], "forward", q, q, q, call)
        plan = documents.plan_of(made, chain[0], starts, own_keys=False)
        taken = torch.zeros(2, 300, dtype=torch.int32)
        for b in range(2):
            for begin, end, row, _, piece, _ in plan.long[b].tolist():
                if end and piece == 0:
                    taken[b, begin + 32 * row : min(begin + 32 * (row + 1), end)] += 1
            for own, own_end, *_ in plan.short[b, : plan.count[b]].tolist():
                taken[b, own:own_end] += 1
        assert taken.eq(1).all()


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_a_tile_list_without_positions_counts_in_documents_too(implementation, kernel_device):
    pattern = PATTERNS["bigbird"]
    q, k, v = inputs(B=2, L=140, Hq=4, Hkv=2, D=16, Dv=16, device=kernel_device)
    every = torch.ones(1, 5, 5, dtype=torch.bool, device=kernel_device)
    given = {
        "documents": numbered(LENGTHS, kernel_device),
        "tiles": TileList.from_layout(every, (32, 32)),
        "implementation": implementation,
    }
    assert_as_exact_as_torch(
        lambda *x: attend(*x, pattern, **given),
        lambda *x: dense_attention(*x, mask_of(pattern, LENGTHS, 4, kernel_device)),
        [q, k, v],
        cotangents(q, v),
    )


# ------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_positions_beyond_the_tokens_find_their_random_blocks(
    is_causal, implementation, kernel_device
):
    """Queries at 64 to 127 see keys at 0 to 63."""
    seen = window(2, block=8) | random_blocks(2, block=8)
    pattern = causal() & seen if is_causal else seen
    q, k, v = inputs(B=1, L=64, Hq=4, Hkv=4, D=16, Dv=16, device=kernel_device)
    every = torch.ones(1, 4, 4, dtype=torch.bool, device=kernel_device)
    where = torch.arange(128, dtype=torch.int32, device=kernel_device)
    i, j = where[64:], where[:64]
    given = {
        "q_position": i[None, None],
        "k_position": j[None, None],
        "tiles": TileList.from_layout(every, (16, 16)),
        "implementation": implementation,
    }
    mask = torch.stack(
        [pattern.visible(i[:, None], j[None], head, length=128) for head in range(4)]
    )
    assert_as_exact_as_torch(
        lambda *x: attend(*x, pattern, **given),
        lambda *x: dense_attention(*x, mask[None]),
        [q, k, v],
        cotangents(q, v),
    )


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize(
    "pattern",
    [
        full(),
        fixed(8, 2),
        window(2, 2, block=8),
        blocks("xx/x.", block=16),
        random_blocks(1, block=8),
    ],
)
def test_a_token_at_a_negative_position_sees_nothing_and_is_seen_by_none(
    pattern, implementation, kernel_device
):
    q, k, v = inputs(B=1, L=32, Hq=2, Hkv=1, D=16, Dv=16, device=kernel_device)
    every = torch.ones(1, 2, 2, dtype=torch.bool, device=kernel_device)
    position = torch.arange(32, dtype=torch.int32, device=kernel_device)
    position[5:9] = torch.tensor([-1, -8, -9, -1_000_000], device=kernel_device)
    given = {
        "q_position": position[None, None],
        "k_position": position[None, None],
        "tiles": TileList.from_layout(every, (16, 16)),
        "implementation": implementation,
    }
    exists = position >= 0
    known = position.clamp(min=0)
    mask = torch.stack(
        [pattern.visible(known[:, None], known[None], head, length=32) for head in range(2)]
    )
    mask = mask & exists[:, None] & exists
    assert_as_exact_as_torch(
        lambda *x: attend(*x, pattern, **given),
        lambda *x: dense_attention(*x, mask[None]),
        [q, k, v],
        cotangents(q, v),
    )
