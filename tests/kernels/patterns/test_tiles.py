"""Tile lists against brute force: no tile missing, none dead, and the work grows with the tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attend.passes import chains
from kernels.patterns import (
    block_diffusion,
    blocks,
    causal,
    dilated,
    find_tiles,
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
    tiles2d,
    tiles3d,
    window,
)
from kernels.patterns.algebra import Not
from kernels.patterns.order import Listed, Order
from kernels.patterns.tiles import TileList, list_tiles
from tests.kernels.patterns.test_patterns import patterns

MILLION = 2**20
TILES = st.sampled_from([1, 4, 16, (8, 32), 64])
BIGBIRD = window(3, block=64) | global_tokens(128) | random_blocks(3, block=64)
LONGFORMER = window(256, 256) | global_tokens(16)


def sides(tile):
    return (tile, tile) if isinstance(tile, int) else tile


def positions(order, length):
    """Where the slots of every group stand, ``(groups, slots)``; at or past ``length``: none."""
    group, slot = (
        torch.arange(order.residues)[:, None],
        torch.arange(order.longest(length))[None, :],
    )
    return order.position(group, slot)


def brute_force(pattern, q_order, k_order, queries, keys, tile, heads):
    """Which tiles hold a visible cell, and which no other: ``(heads, rows, columns)`` each."""
    i, j = positions(q_order, queries), positions(k_order, keys)
    j = j.expand(len(i), -1)
    short = [-x.shape[1] % t for x, t in zip((i, j), tile, strict=True)]
    i, j = (
        torch.nn.functional.pad(x, (0, n), value=2**20) for x, n in zip((i, j), short, strict=True)
    )
    i, j = i[:, :, None], j[:, None, :]
    exists = (i < queries) & (j < keys)
    i, j = i.clamp(max=queries - 1), j.clamp(max=keys - 1)
    seen = torch.stack(
        [pattern.visible(i, j, h, length=max(queries, keys)).expand(exists.shape) for h in heads]
    )
    groups, rows, columns = exists.shape

    def tiled(x):
        return x.view(-1, groups, rows // tile[0], tile[0], columns // tile[1], tile[1])

    some = tiled(seen & exists).any(dim=5).any(dim=3).flatten(1, 2)
    every = tiled(seen | ~exists).all(dim=5).all(dim=3).flatten(1, 2)
    return some, every & some


def assert_lists(tiles, some, every):
    """Fail unless ``tiles`` are exactly the tiles of ``some``, and full ones are in ``every``."""
    assert tiles.heads in (1, len(some))
    assert torch.equal(tiles.layout().expand(some.shape), some)
    assert len(tiles) == int(tiles.layout().sum()) == int(tiles.offsets[-1])
    for row in range(len(tiles.offsets) - 1):
        assert (tiles.keys[tiles.offsets[row] : tiles.offsets[row + 1]].diff() > 0).all()
    listed_full = torch.zeros_like(tiles.layout())
    listed_full.view(-1, tiles.shape[1])[tiles.rows()[tiles.full], tiles.keys[tiles.full]] = True
    assert not (listed_full & ~every).any()


@settings(max_examples=250)
@given(patterns, st.integers(1, 150), TILES, st.integers(1, 3))
def test_the_list_is_what_the_dense_mask_shows(pattern, length, tile, heads):
    tiles = pattern.tiles(length, tile, heads)
    plain = Order(), Order()
    wanted = brute_force(pattern, *plain, length, length, sides(tile), range(heads))
    assert_lists(tiles, *wanted)
    assert tiles.offsets.dtype == tiles.keys.dtype == torch.int32
    assert tiles.heads == (heads if pattern.differs_by_head else 1)


@settings(max_examples=100)
@given(patterns, st.integers(1, 90), st.integers(1, 90), TILES)
def test_keys_may_differ_in_number_from_queries(pattern, queries, keys, tile):
    tiles = pattern.tiles(queries, tile, 2, keys=keys)
    wanted = brute_force(pattern, Order(), Order(), queries, keys, sides(tile), range(2))
    assert_lists(tiles, *wanted)


ORDERS = st.one_of(
    st.integers(1, 9).map(lambda step: (Order(step=step, residues=step),) * 2),
    st.integers(1, 9).map(lambda step: (Order(step=step),) * 2),
    st.tuples(st.integers(1, 4), st.integers(0, 5)).map(
        lambda t: (Order(), Order(run=t[0], step=t[0] + t[1], first=t[1]))
    ),
    st.integers(2, 5).map(lambda step: (Order(step=step, residues=step), Order())),
    st.tuples(st.integers(0, 11), st.sets(st.integers(0, 99)), st.booleans()).map(
        lambda t: (Order(), Listed(positions=tuple(sorted({t[0], *t[1]}))))[:: 1 if t[2] else -1]
    ),
)


@settings(max_examples=250)
@given(patterns, ORDERS, st.integers(12, 90), st.integers(12, 90), TILES, st.booleans())
def test_permuted_and_gathered_tokens(pattern, orders, queries, keys, tile, excluded):
    pattern = Not(pattern.bound()) & causal() if excluded else pattern
    arguments = (pattern, *orders, queries, keys, sides(tile))
    tiles = list_tiles(*arguments, heads=2)
    assert_lists(tiles, *brute_force(*arguments, range(2)))
    assert tiles.residues == orders[0].residues
    assert_transposed(tiles)


def assert_transposed(tiles):
    inverse = tiles.inverse()
    by_group = tiles.layout().unflatten(1, (tiles.residues, -1))
    assert torch.equal(inverse.layout(), by_group.mT.flatten(1, 2))
    assert (inverse.tile, inverse.residues, len(inverse)) == (
        tiles.tile[::-1],
        tiles.residues,
        len(tiles),
    )
    back = inverse.inverse()
    for name in ("offsets", "keys", "full"):
        assert torch.equal(getattr(back, name), getattr(tiles, name))
    assert back.shape == tiles.shape


@given(patterns, st.integers(1, 100), TILES, st.integers(1, 3))
def test_the_inverse_is_the_transpose(pattern, length, tile, heads):
    assert_transposed(pattern.tiles(length, tile, heads))


@pytest.mark.parametrize(
    ("pattern", "orders", "share"),
    [
        (causal() & strided(8), (Order(step=8, residues=8),) * 2, 0.2),
        (causal() & dilated(5, 8), (Order(step=8, residues=8),) * 2, 0.7),
        (causal() & fixed(16, 4, sub_block=1), (Order(), Order(run=4, step=16, first=8)), 0.4),
    ],
)
def test_the_right_order_needs_fewer_tiles(pattern, orders, share):
    tiles = list_tiles(pattern, *orders, 512, 512, (16, 16))
    assert len(tiles) < len(pattern.tiles(512, 16)) * share


def test_what_is_full_is_listed_as_full():
    pattern = causal() & (window(200) | global_tokens(32))
    _, every = brute_force(pattern, Order(), Order(), 640, 640, (16, 16), [0])
    tiles = pattern.tiles(640, 16)
    assert int(tiles.full.sum()) == int(every.sum())
    assert full().tiles(100, 16).full.all()


@pytest.mark.parametrize("beside", [full(), causal(), causal() & window(3), others() & window(1)])
def test_random_blocks_beyond_all_tokens_are_listed(beside):
    pattern = beside & random_blocks(2, block=2**12)
    with Largest() as largest:
        tiles = pattern.tiles(70, 16)
    plain = Order(), Order()
    assert_lists(tiles, *brute_force(pattern, *plain, 70, 70, (16, 16), [0]))
    assert largest.elements <= 2**18


@pytest.mark.parametrize("tile", [(16, 16), (64, 16), (7, 1)])
@pytest.mark.parametrize(
    "pattern",
    [
        near2d(9, 11, (2, 1), channels=3),
        near3d(5, 6, 7, (1, 2, 2)),
        tiles2d(20, 15, (4, 3), 1),
        tiles3d(5, 6, 7, 2, (1, 0, 1)),
        block_diffusion(12, 100),
        global_at(3, 50, 51, 52, 53, 54, 55, 56, 120),
    ],
)
def test_formulas_alone_decide_about_every_tile(pattern, tile, monkeypatch):
    wanted = brute_force(pattern, Order(), Order(), 230, 230, tile, [0])
    looked = []
    monkeypatch.setattr(find_tiles, "look", lambda *tiles: looked.extend(tiles[2].T) or [])
    tiles = pattern.tiles(230, tile)
    assert not looked
    assert_lists(tiles, *wanted)
    assert int(tiles.full.sum()) == int(wanted[1].sum())


def test_large_tiles_are_looked_at_in_pieces():
    pattern = window(3) & window(0, 2, block=7) | others() & window(1)
    with Largest() as largest:
        tiles = pattern.tiles(1300, 600)
    assert largest.elements <= 2**18
    assert_lists(tiles, *brute_force(pattern, Order(), Order(), 1300, 1300, (600, 600), [0]))


@pytest.mark.parametrize(
    ("pattern", "live"),
    [
        (causal() & window(512), 16384 * 9 - 36),
        (causal() & LONGFORMER, 16384 * 6 - 15),
        (LONGFORMER, 16384 * 11 - 30),
        (causal() & BIGBIRD, 16384 * 8 - 28),
        (per_head(causal() & window(64), causal() & window(128)), 16384 * 5 - 4),
    ],
)
def test_a_million_tokens_cost_what_the_live_tiles_cost(pattern, live):
    with Largest() as largest:
        tiles = pattern.tiles(
            MILLION, 64, heads=2 if isinstance(pattern, type(per_head(full()))) else 1
        )
        tiles.inverse()
    assert abs(len(tiles) - live) < 20
    # Eight steps a row and what merging them takes: 64 MiB where a dense list has 256 MiB of bits.
    assert largest.elements < 2**20 * 4


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_tiles_of_a_layout_are_listed_row_by_row():
    layout = torch.rand(3, 5, 7) < 0.4
    tiles = TileList.from_layout(layout, (8, 4))
    assert torch.equal(tiles.layout(), layout)
    assert (tiles.heads, len(tiles), tiles.shape) == (3, int(layout.sum()), (5, 7))
    assert not tiles.full.any()
    assert_transposed(tiles)


def test_a_slot_stands_where_the_order_says():
    assert positions(Order(), 4).tolist() == [[0, 1, 2, 3]]
    assert positions(Order(step=3, residues=3), 7).tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert positions(Order(run=2, step=5, first=3), 14).tolist() == [[3, 4, 8, 9, 13]]
    assert Order(run=2, step=5, first=3).longest(3) == 0
    assert positions(Listed(positions=(1, 4, 9)), 9).tolist() == [[1, 4]]
    assert Listed(positions=(3, 5)).longest(3) == 0


@pytest.mark.parametrize("around", [causal(), full()])
def test_scattered_global_tokens_cost_what_neighbours_do(around):
    length, scattered = 8192, global_at(*range(100, 8192, 506))
    pattern, local = around & (window(64, 64) | scattered), around & window(64, 64)
    (chain,) = chains(pattern, 1)
    gathered = sum(
        len(list_tiles(part.pattern, part.q_order, part.k_order, length, length, (64, 64)))
        for part in chain
    )
    assert gathered <= len(local.tiles(length, 64)) + 128 + 128  # a column and a row of tiles
    assert gathered < len(pattern.tiles(length, 64)) / 4


@pytest.mark.parametrize(("positions", "passes"), [(range(64), 1), (range(65), 1), ([0, 64], 3)])
def test_global_tokens_are_gathered_where_that_spares_tiles(positions, passes):
    (chain,) = chains(window(9, 9) | global_at(*positions), 1)
    assert len(chain) == passes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16), "queries=0"),
        ((8, 0), "tile=0"),
        ((8, (4, -1)), "tile=-1"),
        ((8, 4, 0), "heads=0"),
        ((8, 4, 1, "cpu", 0), "keys=0"),
        ((2**31, 64), f"queries={2**31}"),
    ],
)
def test_impossible_sizes_are_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        others().tiles(*arguments)
    assert "\n" not in str(caught.value)


def test_groups_that_do_not_meet_are_refused():
    orders = Order(step=4, residues=4), Order(step=2, residues=2)
    with pytest.raises(ValueError, match="got 2 and 4"):
        list_tiles(blocks("x", 4), *orders, 8, 8, (4, 4))
