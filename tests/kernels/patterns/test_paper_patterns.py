"""What the papers prove or count about their patterns, beside definitions written out by hand."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from evaluation.raster import first_reached, visible_cells
from kernels.patterns import (
    causal,
    dilated,
    fixed,
    full,
    global_tokens,
    near2d,
    parse,
    per_head,
    random_blocks,
    strided,
    summary,
    tiles2d,
    window,
)
from models.attention import Context
from models.attention.pattern import PatternAttention
from models.feed_forward import SwiGLU
from models.stack import Block

LENGTHS = [1, 2, 17, 63, 64, 65, 127, 128, 129, 300]
BIGBIRD = causal() & (window(3, block=4) | global_tokens(8) | random_blocks(3, block=4))
BIGBIRD_ENCODER = window(1, 1, block=4) | global_tokens(8) | random_blocks(3, block=4)


def raster(length, rule):
    """The cells ``(i, j)`` of a rule on two numbers, one at a time."""
    rows = [[rule(i, j) for j in range(length)] for i in range(length)]
    return torch.tensor(rows, dtype=torch.bool)


def natten(pixel, other, pixels, kernel):
    """Neighbourhood attention along one axis, by the window's start as NATTEN computes it."""
    reach = kernel // 2
    start = max(pixel - reach, 0) + (pixel + reach >= pixels) * (pixels - pixel - reach - 1)
    return start <= other < start + kernel


def natten_of(shape, kernel, channels=1, tile=None):
    """The same on all axes of a picture whose tokens stand row by row; of tiles if ``tile``."""
    tile = tile or [1] * len(shape)

    def rule(i, j):
        i, j = i // channels, j // channels
        seen = max(i, j) < math.prod(shape)
        for pixels, side, size in [*zip(shape, tile, kernel, strict=True)][::-1]:
            i, a = divmod(i, pixels)
            j, b = divmod(j, pixels)
            seen = seen and natten(a // side, b // side, -(-pixels // side), size)
        return seen

    return rule


def block_diffusion_of_the_authors(block, n):
    """The three masks of the released code: block diagonal, offset block causal, block causal."""

    def rule(i, j):
        i_clean, j_clean = i >= n, j >= n
        i_block, j_block = ((x - n if x >= n else x) // block for x in (i, j))
        diagonal = i_block == j_block and i_clean == j_clean
        offset_causal = i_block > j_block and j_clean and not i_clean
        causal = i_block >= j_block and j_clean and i_clean
        return max(i, j) < 2 * n and (diagonal or offset_causal or causal)

    return rule


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("causal() & window(12)", lambda i, j: max(0, i - 11) <= j <= i),
        ("causal() & strided(12)", lambda i, j: j in range(i, -1, -12)),
        ("causal() & fixed(12, 3)", lambda i, j: j <= i and (i // 12 == j // 12 or j % 12 >= 9)),
        ("causal() & summary(12, 3, sub_block=1)", lambda i, j: j <= i and 6 <= j % 12 < 9),
        ("dilated(4, 5)", lambda i, j: j in {i, i - 5, i - 10, i - 15}),
        ("dilated(2, 1, 5)", lambda i, j: j in {i - 10, i - 5, i, i + 5}),
        ("window(5, 5) | global_tokens(3)", lambda i, j: abs(i - j) <= 5 or min(i, j) < 3),
        ("near2d(9, 13, 2)", natten_of((9, 13), (5, 5))),
        ("near2d(7, 9, (1, 3), channels=3)", natten_of((7, 9), (3, 7), channels=3)),
        ("near3d(4, 5, 6, (1, 1, 2), channels=2)", natten_of((4, 5, 6), (3, 3, 5), channels=2)),
        ("tiles2d(12, 16, 4, (0, 1))", natten_of((12, 16), (1, 3), tile=(4, 4))),
        (
            "tiles3d(6, 6, 7, (2, 2, 3), 1, channels=1)",
            natten_of((6, 6, 7), (3, 3, 3), tile=(2, 2, 3)),
        ),
        ("block_diffusion(8, 64)", block_diffusion_of_the_authors(8, 64)),
        ("block_diffusion(7, 50)", block_diffusion_of_the_authors(7, 50)),
        ("global_at(0, 17, 63, 299)", lambda i, j: bool({i, j} & {0, 17, 63, 299})),
        ("window(1, 1, block=12)", lambda i, j: abs(i // 12 - j // 12) <= 1),
    ],
)
def test_the_tiles_show_the_sets_of_the_papers(text, rule, length):
    assert torch.equal(visible_cells(parse(text), length)[0], raster(length, rule))


# ------------------------------------------------------------------------- Sparse Transformer


def test_each_of_the_two_strided_parts_has_the_size_that_the_paper_gives():
    i = torch.arange(300)
    local, columns = (causal() & part for part in (window(16), strided(16)))
    assert torch.equal(local.dense(300).sum(dim=1), (i + 1).clamp(max=16))
    assert torch.equal(columns.dense(300).sum(dim=1), i // 16 + 1)


@pytest.mark.parametrize(
    ("pattern", "length", "keys", "dense_keys"),
    [
        (causal() & fixed(128, 32), 12_288, 1584.5, 6144.5),  # enwik8
        (causal() & (window(128) | strided(128)), 12_288, 174.8, 6144.5),
        (causal() & (window(96) | strided(96)), 3_072, 110.0, 1536.5),  # CIFAR-10
    ],
)
def test_a_query_of_the_published_models_sees_so_many_keys(pattern, length, keys, dense_keys):
    assert pattern.keys_per_query(length) == pytest.approx(keys, abs=0.05)
    assert causal().keys_per_query(length) == dense_keys


def union_of_heads(pattern, length=512):
    return visible_cells(pattern, length, heads=4).any(dim=0)


def connect_all(*layers):
    """Whether layers of these cells, first one first, lead from every key to every later query."""
    return torch.equal(first_reached(layers) > 0, torch.ones_like(layers[0]).tril())


def test_interleaved_strided_layers_connect_everything_in_either_order():
    local, columns = (union_of_heads(causal() & part) for part in (window(32), strided(32)))
    assert connect_all(local, columns)
    assert connect_all(columns, local)
    assert not connect_all(local, local)
    assert not connect_all(columns, columns)


def test_interleaved_fixed_layers_connect_everything_when_the_summaries_are_read_last():
    block = union_of_heads(causal() & window(1, block=32))
    summaries = union_of_heads(causal() & summary(32, 8))
    assert torch.equal(block | summaries, union_of_heads(causal() & fixed(32, 8)))
    assert connect_all(block, summaries)
    assert not connect_all(summaries, block)


def test_heads_of_distinct_sub_blocks_connect_everything_together():
    three = causal() & per_head(*(fixed(32, 8, sub_block=n) for n in range(3)))
    assert not connect_all(union_of_heads(three))
    assert connect_all(union_of_heads(three), union_of_heads(three))
    without_the_last = causal() & per_head(*(fixed(32, 8, sub_block=n) for n in range(1, 4)))
    assert not connect_all(*2 * [union_of_heads(without_the_last)])


def test_heads_whose_sub_blocks_fill_the_block_see_everything_in_one_layer():
    four = causal() & per_head(*(fixed(32, 8, sub_block=n) for n in range(4)))
    assert torch.equal(union_of_heads(four), causal().dense(512))
    for head in range(4):
        assert four.dense(512, head).sum() < 0.5 * causal().dense(512).sum()


# --------------------------------------------------------------------------------- Longformer


@pytest.mark.parametrize("length", [1, 30, 64])
def test_a_window_of_the_whole_length_is_full_attention(length):
    assert torch.equal(window(length).dense(length), causal().dense(length))
    assert torch.equal(window(length - 1, length - 1).dense(length), full().dense(length))


def test_global_tokens_are_symmetric_and_show_no_later_token_under_causal():
    seen = window(4, 4) | global_tokens(5)
    assert torch.equal(seen.dense(100), seen.dense(100).T)
    assert seen.dense(100)[:5].all()
    assert seen.dense(100)[:, :5].all()
    assert not (causal() & seen).dense(100).triu(1).any()


def test_only_the_heads_that_are_named_are_dilated():
    pattern = causal() & per_head(window(4), window(4), dilated(4, 3))
    near, gaps = {9, 8, 7, 6}, {9, 6, 3, 0}
    for head, keys in enumerate([near, near, gaps, near, near, gaps]):
        assert set(pattern.dense(10, head)[9].nonzero().flatten().tolist()) == keys


def test_layers_of_windows_reach_as_far_as_their_sum():
    cells = [union_of_heads(window(w), 200) for w in (8, 16, 32)]
    first = first_reached(cells)
    assert first[199].tolist() == 146 * [0] + 31 * [3] + 15 * [2] + 8 * [1]
    gaps = 3 * [union_of_heads(dilated(4, 8), 200)]
    farthest = int(first_reached(gaps)[199].nonzero().min())
    assert farthest == 199 - 3 * 3 * 8


@pytest.mark.parametrize(
    "texts",
    [
        ["causal() & window(3)", "causal() & window(5)"],
        ["dilated(3, 4)", "dilated(3, 4)", "window(2)"],
        ["causal() & per_head(window(2), dilated(2, 9))"] * 2,
        ["causal() & (window(5) | strided(5))"],
        ["causal() & per_head(fixed(8, 2), fixed(8, 2, sub_block=1))"] * 2,
        ["window(1, 1) | global_tokens(2)"],
        ["window(1, 2)", "window(2, 0)", "window(0, 1)"],
        ["causal() & (window(2, block=4) | random_blocks(1, block=4))"] * 3,
    ],
)
def test_an_output_depends_on_exactly_the_tokens_that_the_layers_reach(texts):
    length = 41
    layers = [PatternAttention(32, 4, n, pattern=text) for n, text in enumerate(texts)]
    blocks = [Block(attention, 32, feed_forward=partial(SwiGLU, hidden=32)) for attention in layers]
    for parameter in nn.ModuleList(blocks).parameters():
        nn.init.normal_(parameter, std=0.3)  # projections that are zero would hide what they pass
    # One copy of the sequence for each query, whose output alone is looked at.
    x = torch.randn(1, length, 32).repeat(length, 1, 1).requires_grad_()
    y = x
    for block in blocks:
        y = block(y, Context(rotary=None))
    (dx,) = torch.autograd.grad((y.diagonal().T * torch.randn(32)).sum(), x)
    depends = dx.abs().amax(dim=2) > 0
    cells = [union_of_heads(attention.pattern, length) for attention in layers]
    assert torch.equal(depends, first_reached(cells) > 0)


# ------------------------------------------------------------------------------------ BigBird


def block_graph(pattern, blocks, heads):
    """Which key blocks of four tokens each query block touches, ``(heads, N, N)`` bool."""
    cells = visible_cells(pattern, 4 * blocks, heads)
    return cells.view(heads, blocks, 4, blocks, 4).any(dim=4).any(dim=2)


@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9, 64])
def test_every_row_of_bigbird_has_its_degree_or_all_that_there_is(blocks):
    row = torch.arange(blocks)
    degree = block_graph(BIGBIRD, blocks, heads=6).sum(dim=2)
    assert torch.equal(degree, (row + 1).clamp(max=3 + 2 + 3).expand(6, -1))
    degree = block_graph(BIGBIRD_ENCODER, blocks, heads=6).sum(dim=2)
    near = torch.where((row == 2) | (row == blocks - 1), 7, 8)  # one block of the window is missing
    wanted = torch.where(row < 2, blocks, near.clamp(max=blocks))
    assert torch.equal(degree, wanted.expand(6, -1))


def test_a_causal_plan_is_empty_above_the_diagonal_and_cut_along_it():
    cells = visible_cells(BIGBIRD, 256, heads=6)
    assert not cells.triu(1).any()
    assert cells.diagonal(dim1=1, dim2=2).all()
    assert not block_graph(BIGBIRD, 64, heads=6).triu(1).any()


def test_through_global_blocks_any_two_blocks_are_two_steps_apart():
    graph = block_graph(BIGBIRD_ENCODER, 64, heads=6).float()
    assert (graph @ graph > 0).all()
    without = block_graph(window(1, 1, block=4) | random_blocks(3, block=4), 64, heads=6).float()
    assert not (without @ without > 0).all()


@pytest.mark.parametrize("length", [1, 60, 64])
def test_a_window_of_all_blocks_leaves_nothing_to_draw(length):
    wide = window(16, block=4) | global_tokens(8)
    for head in range(3):
        for pattern in (causal() & wide, causal() & (wide | random_blocks(3, block=4))):
            assert torch.equal(pattern.dense(length, head), causal().dense(length))


def test_drawn_blocks_are_uniform_over_the_whole_sequence():
    # Row 60 of 64 blocks over 10,000 heads: Google's code draws from the first sixteen blocks only.
    # Three of k without replacement: the statistic is chi-square with k - 1 degrees of freedom.
    causal_term = BIGBIRD.bound().operands[1].operands[2]
    encoder_term = BIGBIRD_ENCODER.bound().operands[2]
    for term, candidates in [
        (causal_term, {*range(2, 58)}),
        (encoder_term, {*range(2, 59), 62, 63}),
    ]:
        drawn = term.draws(10_000, 256)[:, 60]
        assert (drawn.sort(dim=1).values.diff(dim=1) > 0).all()
        assert set(drawn.flatten().tolist()) == candidates
        k = len(candidates)
        counts = drawn.flatten().bincount()[sorted(candidates)].double()
        expected = 30_000 / k
        statistic = float(((counts - expected) ** 2 / expected).sum()) * (k - 1) / (k - 3)
        # Normal approximation of Wilson and Hilferty 1931: exceeded by chance once in a thousand.
        spread = 2 / (9 * (k - 1))
        assert statistic < (k - 1) * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


def test_every_seed_layer_and_head_has_a_plan_of_its_own_whenever_it_is_drawn():
    def plan(head, seed, layer):
        term = random_blocks(3, block=4, seed=seed, layer=layer)
        return (causal() & (window(3, block=4) | term)).dense(256, head)

    keys = [(head, seed, layer) for head in range(3) for seed in range(3) for layer in range(3)]
    plans = {key: plan(*key) for key in keys}
    torch.manual_seed(1)  # no generator enters
    for key in reversed(keys):
        assert torch.equal(plan(*key), plans[key])
    assert len({tuple(cells.flatten().tolist()) for cells in plans.values()}) == 27


# --------------------------------------------------------------------------------- pictures


def attention_gym(shape, kernel):
    """The neighbourhood by its middle, which is kept away from the borders."""

    def rule(i, j):
        seen = True
        places = divmod(i, shape[1]), divmod(j, shape[1])
        for a, b, pixels, size in zip(*places, shape, kernel, strict=True):
            middle = min(max(a, size // 2), pixels - 1 - size // 2)
            seen = seen and abs(middle - b) <= size // 2
        return seen

    return rule


@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (1, 7), (9, 11)])
def test_both_definitions_of_the_neighbourhood_are_the_same(kernel):
    pattern = near2d(9, 11, tuple(size // 2 for size in kernel))
    wanted = raster(99, natten_of((9, 11), kernel))
    assert torch.equal(wanted, raster(99, attention_gym((9, 11), kernel)))
    assert torch.equal(pattern.dense(99), wanted)
    assert (wanted.sum(dim=1) == math.prod(kernel)).all()


def test_a_window_wider_than_the_picture_is_all_of_it():
    assert near2d(5, 6, 2**31 - 1, channels=2).dense(60).all()
    assert near2d(5, 6, (2, 3)).dense(30).all()
    assert near2d(5, 6, (1, 3)).dense(30).sum(dim=1).eq(18).all()
    assert torch.equal(tiles2d(5, 6, 1, 2).dense(30), near2d(5, 6, 2).dense(30))
    assert tiles2d(5, 6, 1, 2) == near2d(5, 6, 2)


def test_tiles_that_are_stored_whole_are_pixels_of_many_channels():
    # A picture of 8 x 12 in tiles of 4 x 3: the token that stands at each place, tile by tile.
    stored = torch.arange(96).view(2, 4, 4, 3).transpose(1, 2).flatten()
    by_rows = tiles2d(8, 12, (4, 3), (0, 1)).dense(96)
    assert torch.equal(by_rows[stored][:, stored], near2d(2, 4, (0, 1), channels=12).dense(96))


def test_a_causal_picture_shows_the_rows_above_and_the_pixels_before():
    assert (causal() & near2d(3, 4, 1)).draw(12).splitlines()[5:7] == [
        "xxx.xx......",
        ".xxx.xx.....",
    ]
    assert row_of(near2d(4, 4, 1), 0) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert row_of(near2d(4, 4, 1), 15) == [5, 6, 7, 9, 10, 11, 13, 14, 15]


def row_of(pattern, i):
    return pattern.dense(16)[i].nonzero().flatten().tolist()
