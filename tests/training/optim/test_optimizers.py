"""AdamW, and Muon with AdamW as one optimizer."""

import io
from functools import partial

import pytest
import torch
from torch.optim import AdamW, Muon

from tests.support.tiny import TinyModel, rows
from training.optim import muon, optimizers
from training.optim.muon import BatchedMuon

MUON = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.05}
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
MAKERS = {
    "adamw": partial(optimizers.adamw, **ADAMW),
    "muon": partial(
        optimizers.muon, **MUON, adamw_lr=3e-3, adamw_betas=(0.9, 0.95), adamw_eps=1e-8
    ),
}


def train(model, optimizers, steps):
    for step in steps:
        batch = rows(4, seed=step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:])[0].backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_equal_parameters(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_adamw_decays_matrices_but_neither_embeddings_nor_vectors():
    model = TinyModel()
    decay = {
        id(p): group["weight_decay"]
        for group in MAKERS["adamw"](model).param_groups
        for p in group["params"]
    }
    decayed = {name for name, p in model.named_parameters() if decay[id(p)] == 0.1}
    assert decayed == {"blocks.0.1.weight", "blocks.1.1.weight", "head.weight"}
    assert len(decay) == len(list(model.parameters()))


def test_muon_holds_the_two_optimizers_of_matrices_and_rest():
    model, twin = TinyModel(), TinyModel()
    matrices = [p for block in twin.blocks for p in block.parameters() if p.dim() == 2]
    rest = [p for p in twin.parameters() if all(p is not m for m in matrices)]
    by_hand = [
        BatchedMuon(matrices, **MUON),
        AdamW(rest, **ADAMW | {"weight_decay": 0.0}),
    ]
    train(model, [MAKERS["muon"](model)], range(5))
    train(twin, by_hand, range(5))
    assert len(matrices) == 2
    assert_equal_parameters(model, twin)


def test_batched_muon_moves_every_matrix_as_torchs_muon_does(device):
    shapes = [(24, 8), (8, 8), (24, 8), (8, 40), (8, 8)]
    start = [torch.randn(shape, device=device) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = BatchedMuon(ours, **MUON), Muon(theirs, **MUON, adjust_lr_fn="original")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for x, p, q in zip(start, ours, theirs, strict=True):
        moved, expected = p - x, q - x
        # torch iterates in bf16: each matrix moves 2 % differently at most.
        assert (moved - expected).norm() < 0.02 * expected.norm()
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert set(states[0]) == set(states[1])
    for index in states[0]:
        mine, other = (state[index]["momentum_buffer"] for state in states)
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("matrices", [1, 4, 5])
def test_each_process_does_its_share_of_the_rows_and_gets_all(monkeypatch, matrices):
    x, done = torch.randn(matrices, 3, 2), []

    def share_of(rank, processes=3):
        def keep(found, own):
            done.append(own)
            found.copy_(torch.full_like(found, rank))

        monkeypatch.setattr(muon.distributed, "get_world_size", lambda: processes)
        monkeypatch.setattr(muon.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(muon.distributed, "all_gather_into_tensor", keep)
        assert muon.in_shares(torch.neg, x).shape == x.shape

    for rank in range(3):
        share_of(rank)
    assert len({own.shape for own in done}) == 1
    assert torch.equal(torch.cat(done)[:matrices], -x)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_saved_and_loaded_halfway_it_ends_where_an_uninterrupted_run_does(make):
    model = TinyModel()
    train(model, [make(model)], range(6))

    first, second = TinyModel(), TinyModel()
    optimizer = make(first)
    train(first, [optimizer], range(3))
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second.load_state_dict(weights)
    optimizer = make(second)
    optimizer.load_state_dict(state)
    train(second, [optimizer], range(3, 6))
    assert_equal_parameters(model, second)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_rate_of_zero_stops_all_parameters_also_after_loading(make):
    model = TinyModel()
    optimizer = make(model)
    train(model, [optimizer], range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    before = [p.clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, [optimizer], range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("maker", "setting", "message"),
    [
        ("adamw", {"lr": -1}, "optimizer.lr must be at least 0 and finite, got -1"),
        ("adamw", {"weight_decay": -0.1}, "optimizer.weight_decay .* got -0.1"),
        ("adamw", {"betas": (0.9, 1.0)}, "optimizer.betas .* below 1, got 1.0"),
        ("muon", {"lr": float("inf")}, "optimizer.lr .* got inf"),
        ("muon", {"weight_decay": -0.1}, "optimizer.weight_decay .* got -0.1"),
        ("muon", {"momentum": 1.5}, "optimizer.momentum .* below 1, got 1.5"),
        ("muon", {"adamw_eps": float("nan")}, "optimizer.adamw_eps .* got nan"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_key(maker, setting, message):
    with pytest.raises(ValueError, match=message):
        MAKERS[maker](TinyModel(), **setting)


def test_muon_runs_the_closure_that_lightning_gives_it():
    model = TinyModel()
    batch = rows(4, seed=0)
    optimizer = MAKERS["muon"](model)

    def closure():
        loss = model.loss(batch[:, :-1], batch[:, 1:])[0]
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first
