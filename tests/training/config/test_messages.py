"""A mistake found before training is one line and status 2; a later error is a traceback."""

import importlib.util
from functools import partial
from pydoc import ErrorDuringImport

import lightning as L
import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.support.configs import composed
from tests.support.tiny import fit
from training.config.messages import UserErrors
from training.config.moved import MODULES, refuse_moved_keys
from training.config.validate import check_targets, check_types


@pytest.fixture(autouse=True)
def default_environment(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def message_of(action, capsys) -> str:
    with pytest.raises(SystemExit) as leaving, UserErrors():
        action()
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def throw(error):
    raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("dim must be\n  divisible"), "error: dim must be divisible\n"),
        (FileNotFoundError("no file x; give one."), "error: no file x; give one.\n"),
        (PermissionError(13, "Permission denied", "/x"), "error: Permission denied: /x\n"),
    ],
)
def test_a_mistake_is_one_line(error, message, capsys):
    assert message_of(partial(throw, error), capsys) == message


def test_hydra_wrapping_is_taken_off(capsys):
    node = {"_target_": "training.callbacks.checkpoints.Checkpoints", "output": "x"}
    message = message_of(lambda: instantiate(node, every_steps=0), capsys)
    assert message == "error: callbacks.checkpoints.every_steps must be at least 1, got 0.\n"


def test_an_unknown_key_names_the_class_the_key_and_the_nearest_one(capsys):
    node = {
        "_target_": "training.callbacks.checkpoints.Checkpoints",
        "output": "x",
        "every_step": 1,
    }
    message = message_of(lambda: check_targets(node), capsys)
    assert message == "error: Checkpoints has no key `every_step`; did you mean `every_steps`?\n"
    message = message_of(lambda: check_targets({"callbacks": [node]}), capsys)
    assert message.startswith("error: callbacks[0]: Checkpoints has no key `every_step`; ")


def test_an_unknown_key_of_an_attention_inside_a_model_is_found(capsys):
    attention = {
        "_target_": "models.attention.bigbird.BigBirdAttention", "_partial_": True,
        "block": 16, "window_blocks": 3, "global_blocks": 1, "random_block": 1, "seed": 0,
    }  # fmt: skip
    node = {
        "_target_": "models.transformer.Transformer", "dim": 32, "layers": 1, "heads": 2,
        "attention": {"bigbird": attention}, "layout": ["bigbird"], "embedding": {
            "_target_": "models.embeddings.Embedding", "_partial_": True, "vocab_size": 256,
        },
    }  # fmt: skip
    message = message_of(lambda: check_targets(node), capsys)
    assert "BigBirdAttention has no key `random_block`; did you mean `random_blocks`?" in message


def test_a_key_that_is_not_given_is_named(capsys):
    node = {"_target_": "training.callbacks.checkpoints.Checkpoints", "output": "x"}
    message = message_of(lambda: check_targets(node), capsys)
    assert message.startswith("error: Checkpoints lacks 'every_steps'; set ")


def test_an_unknown_key_that_is_like_no_other_lists_them(capsys):
    node = {"_target_": "training.optim.optimizers.adamw", "_partial_": True, "zzz": 1}
    message = message_of(lambda: check_targets(node), capsys)
    assert message.startswith("error: adamw has no key `zzz`; its keys are model, lr, ")


def test_the_code_supplies_what_may_be_positional_where_a_target_is_partial(capsys):
    node = {"_target_": "training.schedules.cosine", "_partial_": True, "warmup_steps": 1}
    message = message_of(lambda: check_targets(node), capsys)
    assert message.startswith("error: cosine lacks 'final'; set ")
    check_targets(node | {"final": 0.0})
    message = message_of(lambda: check_targets(node | {"_partial_": False}), capsys)
    assert message.startswith("error: cosine lacks 'step', 'progress', 'final'; set ")


@pytest.mark.parametrize(
    ("argument", "now"),
    [
        ("model.recompute=true", "model.stack=recompute"),
        ("++model.recompute=true", "model.stack=recompute"),
        ("phases.2.length=4096", "phases.2.data.length"),
        ("phases.0.windows=[8]", "phases.0.model.attention.longformer.window"),
        ("model.feed_forward.bias=false", "model.block.feed_forward.bias"),
    ],
)
def test_a_key_that_has_moved_says_what_to_write(argument, now, capsys):
    with pytest.raises(SystemExit) as leaving:
        refuse_moved_keys(["data=sample", argument])
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    key = argument.lstrip("+").partition("=")[0]
    assert message.startswith(f"error: {key} has moved; write {now}")
    assert message.count("\n") == 1
    refuse_moved_keys(["data=sample", "phases.0.steps=3", "prompt=model.recompute"])


@pytest.mark.parametrize(("old", "now"), MODULES.items())
def test_a_target_that_has_moved_says_where_it_is(old, now, capsys):
    assert importlib.util.find_spec(now)
    message = message_of(lambda: check_targets({"_target_": f"{old}.Thing"}, "x"), capsys)
    assert message == f"error: x._target_: {old}.Thing has moved; write {now}.Thing instead.\n"


def test_a_value_that_is_not_given_is_one_line(capsys):
    config = OmegaConf.create({"data": {"path": "???"}})
    assert "data.path" in message_of(lambda: config.data.path, capsys)


def test_a_reference_to_nothing_is_one_line(capsys):
    config = OmegaConf.create({"task": {"objective": {"scored_fraction": "${data.masking.share}"}}})
    message = message_of(lambda: config.task.objective.scored_fraction, capsys)
    assert message.startswith(
        "error: `objective.scored_fraction` refers to ${data.masking.share}, which "
    )


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(TypeError, match="unexpected keyword"), UserErrors():
        throw(no_such=1)
    with pytest.raises(KeyError), UserErrors():
        throw(KeyError("x"))
    with pytest.raises(InstantiationException), UserErrors():
        instantiate({"_target_": "no_such_module.Thing"})


def test_a_file_of_the_users_that_cannot_be_imported_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "my_optimizer.py").write_text("import torhc")
    monkeypatch.syspath_prepend(tmp_path)
    config = composed("optimizer._target_=my_optimizer.Mine", "run_id=x")
    with pytest.raises(ErrorDuringImport, match="torhc"), UserErrors():
        check_types(config)


def test_the_full_error_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="x"), UserErrors():
        throw(ValueError("x"))


class Fail(L.Callback):
    def __init__(self, hook):
        setattr(self, hook, lambda *_: throw(ValueError(f"wrong in {hook}")))


def test_before_the_first_step_an_error_is_one_line_and_afterwards_a_traceback(tmp_path, capsys):
    def train(hook):
        with UserErrors() as errors:
            fit(tmp_path, callbacks=[errors, Fail(hook)])

    assert "wrong in on_train_start" in message_of(lambda: train("on_train_start"), capsys)
    with pytest.raises(ValueError, match="wrong in on_train_batch_end"):
        train("on_train_batch_end")
