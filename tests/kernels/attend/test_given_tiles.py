"""A tile list of the caller's: prepared once for a step, without waiting for the device."""

import pytest
import torch

from kernels.attend import attend, work
from kernels.patterns import causal
from kernels.patterns.tiles import TileList
from tests.kernels.attend.test_attend import cotangents, inputs
from tests.support.oracle import assert_as_exact_as_torch, dense_attention, gradients

TILE = (16, 32)


def listed(length: int, heads: int, share: float) -> tuple[TileList, torch.Tensor]:
    """A random list whose first row and last column are long, and the cells that it allows."""
    shape = (heads, -(-length // TILE[0]), -(-length // TILE[1]))
    layout = torch.rand(shape) < share
    layout[:, 0], layout[:, :, -1] = True, True
    cells = layout.repeat_interleave(TILE[0], 1).repeat_interleave(TILE[1], 2)
    return TileList.from_layout(layout, TILE), cells[None, :, :length, :length]


def positions(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.int32)[None, None]


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(work, "PART_TILES", 2)
    monkeypatch.setattr(work, "PART_ROWS", 0)


@pytest.mark.parametrize("heads", [1, 2])
def test_rows_that_are_cut_in_parts_are_exact(heads, short_parts, kernel_device):
    q, k, v = inputs(B=2, L=150, Hq=2, Hkv=1, D=16, Dv=16, device=kernel_device)
    tiles, cells = listed(150, heads, share=0.2)
    given = {"q_position": positions(150).to(kernel_device), "tiles": tiles}
    mask = cells.to(kernel_device) & causal().dense(150, device=kernel_device)
    prepared = work.ListedWork.of(tiles, kernel_device)
    assert min(int((x.cut[:, 2] > 1).sum()) for x in (prepared.rows, prepared.columns)) > 0
    assert_as_exact_as_torch(
        lambda *x: attend(*x, causal(), implementation="fused", **given),
        lambda *x: dense_attention(*x, mask),
        [q, k, v],
        cotangents(q, v),
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_room_is_enough_and_every_tile_is_visited_once(heads, share, short_parts):
    tiles, _ = listed(400, heads, share)
    for one in (tiles, tiles.inverse()):
        bounded = work.make_work(one)
        exact = bounded.trimmed()
        assert len(bounded) >= len(exact)
        assert bounded.parts > exact.parts  # one more, which nobody reads
        assert int(exact.items[..., 3].max()) == exact.parts - 1
        assert exact.cut[:, 2].gt(1).all()
        surplus = bounded.items[:, len(exact) :]
        assert surplus[..., 1].eq(surplus[..., 2]).all()
        assert surplus[..., 3].eq(bounded.parts - 1).all()
        visits = torch.zeros(len(one), dtype=torch.int32)
        for _, low, high, _ in bounded.items.flatten(0, 1).tolist():
            visits[low:high] += 1
        assert visits.eq(1).all()


def test_a_list_is_prepared_once_for_both_directions(monkeypatch, kernel_device):
    made = []
    plain = work.make_work
    monkeypatch.setattr(work, "make_work", lambda tiles: made.append(tiles) or plain(tiles))
    q, k, v = (x.requires_grad_() for x in inputs(L=70, device=kernel_device))
    tiles, _ = listed(70, 1, share=0.5)
    out, lse = attend(q, k, v, causal(), tiles=tiles, implementation="fused")
    (out.sum() + lse.sum()).backward()
    assert len(made) == 2  # the list, and its inverse


def test_a_list_is_prepared_without_a_look_at_its_numbers():
    """On the meta device, where any question about a number is an error."""
    tiles, _ = listed(400, 2, share=0.3)
    on_meta = TileList(
        *(x.to("meta") for x in (tiles.offsets, tiles.keys, tiles.full)), tiles.shape, tiles.tile
    )
    prepared = work.ListedWork.of(on_meta, torch.device("meta"))
    expected = work.ListedWork.of(tiles, torch.device("cpu"))
    for a, b in zip(prepared.flatten()[:-1], expected.flatten()[:-1], strict=True):
        assert a.shape == b.shape


def test_a_compiled_model_takes_a_list_in_one_graph(short_parts, kernel_device):
    q, k, v = inputs(B=1, L=100, device=kernel_device)
    tiles, _ = listed(100, 1, share=0.4)
    parts = [x.to(kernel_device) for x in (tiles.offsets, tiles.keys, tiles.full)]

    def loss(q, k, v):
        own = TileList(*parts, tiles.shape, tiles.tile)
        out, lse = attend(q, k, v, causal(), tiles=own, implementation="fused")
        return (out * out).sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True)
    one = torch.ones((), device=kernel_device)
    expected = gradients(lambda *x: (loss(*x),), [q, k, v], one)
    actual = gradients(lambda *x: (compiled(*x),), [q, k, v], one)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
