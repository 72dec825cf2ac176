"""Checkpoints that commit 480f83e wrote still load, and evaluate to what they did then."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import eval as evaluation_script
from models.attention.bigbird import BigBirdAttention
from models.embeddings import Embedding
from models.heads import Head
from models.transformer import Transformer
from tests.support.commands import curve, place, run
from tests.support.configs import CONF, composed
from training.optim.optimizers import adamw, muon
from training.run.checkpoint import model_weights, parse_config, read_checkpoint, rebuild
from training.run.folder import _first_difference
from training.run.migrations import migrate, migrate_checkpoint

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
NAMES = ("bigbird", "longformer")
# Bits per byte that the code of 480f83e printed for them, on the first 2,000 tokens of the test.
BITS_PER_BYTE = {"bigbird": 7.908339320454359, "longformer": 7.941920353955984}
# What each old key of a model's section is now, all set to something else than by default.
OLD_MODEL = {
    "_target_": "models.transformer.Transformer", "_convert_": "all", "vocab_size": 300, "dim": 64,
    "layers": 2, "heads": 4, "layout": ["a"], "feed_forward": {
        "_target_": "models.feed_forward.MLP", "_partial_": True, "activation": "gelu",
    }, "hidden": 96, "norm": "layer", "dropout": 0.3, "embedding_dropout": 0.1, "tied_head": True,
    "rotary_base": None, "masked": True, "documents": "split", "image_shape": [4, 4, 3],
    "matrix_shape": [8, 9], "global_vectors": 2, "initialise": {
        "_target_": "models.initialisation.scaled_normal", "_partial_": True, "std": 0.02,
    }, "recompute": True, "attention": {"a": {
        "_target_": "models.attention.bigbird.BigBirdAttention", "_partial_": True,
        "causal": False, "global_tokens": 2,
    }},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_is_rebuilt_with_its_weights(name):
    checkpoint = read_checkpoint(CHECKPOINTS / f"{name}.ckpt")
    model = rebuild(checkpoint["config"], "model")
    model.load_state_dict(model_weights(checkpoint))
    old = yaml.safe_load(checkpoint["config"])["model"]
    stack = "RecomputedStack" if old["recompute"] else "Stack"
    assert type(model.blocks).__name__ == stack
    assert rebuild(checkpoint["config"], "data").documents == old["documents"]


@pytest.mark.parametrize("name", NAMES)
def test_its_optimizer_has_the_parameters_in_the_same_order(name):
    checkpoint = read_checkpoint(CHECKPOINTS / f"{name}.ckpt")
    model = rebuild(checkpoint["config"], "model")
    settings = parse_config(checkpoint["config"])["optimizer"]
    make = {"bigbird": muon, "longformer": adamw}[name]
    keys = {key: value for key, value in settings.items() if not key.startswith("_")}
    optimizer = make(model, **keys)
    (state,) = checkpoint["optimizer_states"]
    optimizer.load_state_dict(copy.deepcopy(state))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = optimizer.state[parameter]
            assert kept.get("exp_avg", kept.get("momentum_buffer")).shape == parameter.shape


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_evaluates_to_what_it_did(name, tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    path.write_bytes((CHECKPOINTS / f"{name}.ckpt").read_bytes())
    evaluation_script.evaluate(
        composed(f"checkpoint={path}", f"paths.cache={tmp_path / 'cache'}", "device=cpu",
                 "limit=2000", "batch_tokens=1024", name="eval")
    )  # fmt: skip
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:5])
    assert printed["bits per byte"] == f"{BITS_PER_BYTE[name]:.4f}"
    result = yaml.safe_load((tmp_path / "evaluation.json").read_text())
    assert result["bits_per_byte"] == pytest.approx(BITS_PER_BYTE[name], rel=1e-6)


def test_every_old_key_of_a_model_has_its_place():
    model = rebuild(yaml.safe_dump({"model": OLD_MODEL}), "model")
    embedding, block = model.embedding, model.blocks[0]
    assert (embedding.vocab_size, embedding.mask_id, len(embedding.weight)) == (300, 301, 302)
    assert [positions.shape for positions in embedding.positions] == [(4, 4, 3), (8, 9)]
    assert (embedding.num_global, embedding.dropout.p, block.dropout.p) == (2, 0.1, 0.3)
    assert block.feed_forward.up.out_features == 96
    assert [type(norm) for norm in (block.attention_norm, model.head.norm)] == 2 * [
        torch.nn.LayerNorm
    ]
    assert model.head.embedding is embedding
    assert model.rotary_base is None
    assert block.recompute
    assert block.attention.projections.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_what_is_of_today_stays_as_it_is():
    for path in (CONF / "experiment").glob("*.yaml"):
        config = composed(f"experiment={path.stem}", "run_id=x")
        plain = OmegaConf.to_container(config, resolve=True)
        assert migrate(copy.deepcopy(plain)) == plain


def test_a_phase_becomes_changes_of_the_configuration():
    phases = parse_config(read_checkpoint(CHECKPOINTS / "longformer.ckpt")["config"])["phases"]
    assert phases[1] == {
        "steps": 2,
        "data": {"length": 128},
        "optimizer": {"lr": 0.005},
        "model": {"attention": {"longformer": {"window": [16, 32]}}},
    }
    muon = {"optimizer": {"lr": 0.02, "adamw_lr": 0.004}, "phases": [{"steps": 1, "lr": 0.01}]}
    assert migrate(muon)["phases"][0]["optimizer"] == {"lr": 0.01, "adamw_lr": 0.002}


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_today_has_the_settings_of_the_old_run(name):
    """So that it may go on: `resume` compares the two."""
    saved = parse_config(read_checkpoint(CHECKPOINTS / f"{name}.ckpt")["config"])
    small = ["model.dim=16", "model.heads=2", "model.layers=2", "run_id=x"]
    own = {
        "bigbird": ["data=pg19_sample", "model.attention.bigbird.block=8",
                    "model.attention.bigbird.global_blocks=1"],
        "longformer": ["data=sample", "model.stack=recompute"],
    }  # fmt: skip
    now = OmegaConf.to_container(composed(f"model={name}", *own[name], *small), resolve=True)
    assert _first_difference(saved["model"], now["model"], "model") is None
    assert saved["data"]["corpus"] == now["data"]["corpus"]


@pytest.mark.parametrize("junk", [{}, {"model": 3}, {"model": []}, {"task": None, "model": {1: 2}}])
def test_what_is_no_model_is_left_to_the_checks(junk):
    assert migrate(copy.deepcopy(junk)) == junk


def transformer(tied: bool) -> Transformer:
    embedding = partial(Embedding, vocab_size=16, matrix_shape=[4, 5], global_vectors=3)
    return Transformer(
        dim=32, layers=2, heads=4, attention={"a": partial(BigBirdAttention, causal=False)},
        layout=["a"], embedding=embedding, head=partial(Head, tied=tied),
    )  # fmt: skip


def name_now(name: str) -> str:
    return f"embedding.{name}" if name.startswith(("positions.", "global_vectors.")) else name


def as_it_was(weights: dict[str, torch.Tensor], tied: bool) -> dict[str, torch.Tensor]:
    """Names and order of the parameters at 480f83e."""
    moved = {
        name.removeprefix("embedding."): weight
        for name, weight in weights.items()
        if name.startswith(("embedding.positions.", "embedding.global_vectors."))
    }
    kept = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith(("embedding.positions.", "embedding.global_", "head.embedding."))
    }
    if tied:
        kept["head.weight"] = weights["embedding.weight"]
    return kept | moved


MAKE = {
    "adamw": partial(adamw, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8),
    "muon": partial(
        muon, lr=0.1, momentum=0.9, weight_decay=0.1, adamw_lr=0.1, adamw_betas=(0.9, 0.99),
        adamw_eps=1e-8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", MAKE)
def test_positions_and_vectors_move_with_their_weights_and_their_moments(optimizer, tied):
    model = transformer(tied)
    made = MAKE[optimizer](model)
    weights = model.state_dict()
    old = as_it_was(weights, tied)
    ours = {id(p): name for name, p in model.named_parameters()}
    number_now = {name: float(n) for n, name in enumerate(ours.values())}
    groups, state = [], {}
    for group in made.param_groups:  # each as it was: its parameters in the order of the old model
        names = {ours[id(p)] for p in group["params"]}
        before = [new for new in map(name_now, old) if new in names]
        groups.append({**group, "params": list(range(len(state), len(state) + len(before)))})
        for name in before:
            moment = torch.full_like(model.get_parameter(name), number_now[name])
            state[len(state)] = {"step": torch.tensor(1.0), "exp_avg": moment}
    checkpoint = {
        "state_dict": {f"model.{name}": weight for name, weight in old.items()},
        "optimizer_states": [{"state": state, "param_groups": groups}],
    }
    checkpoint["current_model_state"] = dict(checkpoint["state_dict"])
    found = migrate_checkpoint(checkpoint)
    assert found["state_dict"].keys() == found["current_model_state"].keys()
    fresh = transformer(tied)
    fresh.load_state_dict(model_weights(found))
    assert all(torch.equal(weights[name], weight) for name, weight in fresh.state_dict().items())
    made.load_state_dict(found["optimizer_states"][0])
    for number, (name, parameter) in enumerate(model.named_parameters()):
        assert torch.all(made.state[parameter]["exp_avg"] == number), name


SIZES = [
    "data.length=64", "data.batch_tokens=256", "data.validation_tokens=512", "data.workers=0",
    "model.dim=16", "model.heads=2", "model.layers=2", "trainer=cpu", "trainer.log_every=1",
    "trainer.validate_every=null", "callbacks.samples.tokens=4", "schedule.warmup_steps=2",
]  # fmt: skip
COMMANDS = {
    "bigbird": [
        "model=bigbird", "data=pg19_sample", "data.documents=pack", "trainer.max_steps=6",
        "model.attention.bigbird.block=8", "model.attention.bigbird.global_blocks=1",
    ],
    "longformer": [
        "model=longformer", "data=sample", "optimizer=adamw", "schedule=constant",
        "model.stack=recompute",
        "phases=[{steps: 2, model: {attention: {longformer: {window: [8, 16]}}}}, "
        "{steps: 4, data: {length: 128}, optimizer: {lr: 0.005}, "
        "model: {attention: {longformer: {window: [16, 32]}}}}]",
    ],
}  # fmt: skip
# What 480f83e logged in the two steps after it had read its own checkpoint, and at their end.
LOSS_NATS = {
    "bigbird": (5.466887474060059, 5.434260845184326),
    "longformer": (5.459926128387451, 5.384967803955078),
}
VALIDATION = {"bigbird": 7.795621871948242, "longformer": 7.699099063873291}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_goes_on_as_it_would_have(name, tmp_path):
    folder = tmp_path / "run"
    result = run(
        "train.py", *SIZES, *COMMANDS[name], *place(folder), f"resume={CHECKPOINTS / name}.ckpt"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    steps = curve(folder)
    losses = [steps[step]["train/loss_nats"] for step in (5, 6)]
    assert losses == pytest.approx(LOSS_NATS[name], rel=1e-6)
    assert steps[6]["val/bits_per_byte"] == pytest.approx(VALIDATION[name], rel=1e-6)
