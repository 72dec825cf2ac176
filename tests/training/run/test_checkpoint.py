"""Checkpoints: no failed save loses one, and no file or saved config runs code when it is read."""

import os
import pickle

import pytest
import torch
import yaml
from hydra import compose, initialize
from omegaconf import OmegaConf

from tests.support.configs import CONF, composed
from tests.support.tiny import fit
from training.run.checkpoint import AtomicCheckpointIO, model_weights, read_checkpoint, rebuild

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CHECKPOINT = {
    "pytorch-lightning_version": "2.6.6",
    "state_dict": {"model.weight": torch.arange(3.0)},
    "config": "model: {}",
}


class Hostile:
    """Unpickling it runs a command that leaves a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    return path


def assert_only_the_first_is_there(path):
    assert torch.equal(read_checkpoint(path)["state_dict"]["model.weight"], torch.arange(3.0))
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_an_error_and_the_previous_checkpoint_stays(path):
    path.with_name(".last.ckpt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"last.ckpt could not be written \(.*resumed\.$"):
        AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(10**6)}, path)
    assert_only_the_first_is_there(path)


@pytest.mark.parametrize(
    "failure", [PermissionError(13, "Permission denied"), KeyboardInterrupt, RuntimeError("broken")]
)
def test_a_save_that_fails_half_way_is_an_error_and_the_previous_stays(path, failure, monkeypatch):
    def torch_save(checkpoint, file):
        file.write(b"half of it")
        raise failure

    monkeypatch.setattr(torch, "save", torch_save)
    with pytest.raises((OSError, KeyboardInterrupt)):
        AtomicCheckpointIO().save_checkpoint({}, path)
    assert_only_the_first_is_there(path)


def test_a_checkpoint_that_could_not_be_loaded_again_is_never_put_in_place(path, tmp_path):
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT | {"x": Hostile(tmp_path / "trace")}, path)
    assert_only_the_first_is_there(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
@pytest.mark.parametrize("read", [read_checkpoint, AtomicCheckpointIO().load_checkpoint])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, write, read):
    path, trace = tmp_path / "hostile.ckpt", tmp_path / "trace"
    write(CHECKPOINT | {"callbacks": Hostile(trace)}, path)
    with pytest.raises(ValueError, match=r"hostile.ckpt (was refused|is not a complete)"):
        read(path)
    assert not trace.exists()


def test_resuming_refuses_a_pickle_and_ignores_what_names_an_instantiator(tmp_path):
    trainer, _ = fit(tmp_path, max_steps=1)
    path, trace = tmp_path / "named.ckpt", tmp_path / "trace"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"] = {"_instantiator": "os.system", "command": f"touch {trace}"}
    torch.save(checkpoint, path)
    fit(tmp_path, max_steps=2, resume=path)
    torch.save(checkpoint | {"x": Hostile(trace)}, path)
    with pytest.raises(ValueError, match="was refused"):
        fit(tmp_path, max_steps=2, resume=path)
    assert not trace.exists()


def test_a_missing_or_broken_checkpoint_is_one_sentence(path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nowhere.ckpt; give"):
        read_checkpoint(path.with_name("nowhere.ckpt"))
    for content, message in {
        path.read_bytes()[:-200]: "is not a complete checkpoint",
        b"": "is not a complete checkpoint",
        b"text\n": "is not a complete checkpoint",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no training state"):
        read_checkpoint(path)


def small_config() -> dict:
    with initialize(version_base="1.3", config_path="../../../conf"):
        groups = ["+model=bigbird", "+data=sample", "+paths=default", "+seed=1", "+run_id=x"]
        config = compose(overrides=[*groups, "model.dim=32", "model.heads=2", "model.layers=2"])
    return OmegaConf.to_container(config, resolve=True)


def test_a_model_is_rebuilt_from_saved_text_with_equal_weights_and_names():
    text = yaml.safe_dump(small_config())
    model = rebuild(text, "model")
    state = {f"model.{name}": w for name, w in model.state_dict().items()}
    rebuild(text, "model").load_state_dict(model_weights({"state_dict": state}))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_model_of_every_experiment_is_rebuilt(experiment):
    config = composed(f"experiment={experiment}", "run_id=x")
    with torch.device("meta"):
        rebuild(OmegaConf.to_yaml(config, resolve=True), "model")


def test_data_are_rebuilt_with_what_the_caller_replaces():
    assert rebuild(yaml.safe_dump(small_config()), "data", changes={"workers": 0}).workers == 0


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "models.transformer.torch.load",
        "models.transformer.nn.Linear",  # prefix ours, class torch's
        "models.transformer.F.relu",
        "models.embeddings.rotary_tables",  # a function, and no initialisation
        "models.initialisation.nn.init.zeros_",
        "models.transformer",  # a module
        "models.heads.os.system",
        "modelsx.Transformer",
        "data.module.SequenceData",  # ours, of another section
        "hydra.utils.instantiate",
        "..os.system",
        "",
        None,
        ["os.system"],
    ],
)
@pytest.mark.parametrize("place", ["model", "attention", "list"])
def test_a_saved_config_instantiates_classes_of_its_own_package_only(target, place):
    config = small_config()
    hostile = {"_target_": target, "command": "false"}
    if place == "model":
        config["model"] = hostile
    elif place == "attention":
        config["model"]["attention"]["bigbird"]["block"] = hostile
    else:
        config["model"]["layout"] = [[hostile]]
    with pytest.raises(ValueError, match=r"refused: `model.*_target_` is"):
        rebuild(yaml.safe_dump(config), "model")


@pytest.mark.parametrize("target", ["data.prepare.download.fetch", "data.module.os.makedirs"])
def test_functions_below_data_are_not_called(target):
    config = small_config()
    config["data"]["corpus"] = {"_target_": target, "url": "http://127.0.0.1"}
    with pytest.raises(ValueError, match="refused"):
        rebuild(yaml.safe_dump(config), "data")


@pytest.mark.parametrize(
    "addition", [{"_args_": [1]}, {"dim": "${oc.env:HOME}"}, {"${oc.env:HOME}": 1}]
)
def test_a_saved_config_cannot_interpolate_or_pass_positional_arguments(addition):
    config = small_config()
    config["model"] |= addition
    with pytest.raises(ValueError, match="refused"):
        rebuild(yaml.safe_dump(config), "model")


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['false']", "[]", "model: 3"])
def test_text_that_is_no_configuration_is_refused(text):
    with pytest.raises(ValueError, match="saved configuration"):
        rebuild(text, "model")


def test_aliases_that_would_grow_beyond_all_memory_are_refused_at_once():
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 30)]
    bomb = "\n".join(["l0: &l0 [x]", *levels, "model: *l29"])
    with pytest.raises(ValueError, match="refused"):
        rebuild(bomb, "model")
    with pytest.raises(ValueError, match="refused"):
        rebuild("model: &m {a: *m}", "model")


@pytest.mark.parametrize("text", ["[]", "3", "model: 3", "a: [", ""])
def test_a_saved_config_that_is_none_is_one_sentence(text):
    with pytest.raises(ValueError, match="saved configuration"):
        rebuild(text, "model")
