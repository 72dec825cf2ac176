"""Every yaml of conf composes, and what it describes can be built."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from tests.support.configs import CONF, composed

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
CHOICES = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((CONF / group).glob("*.yaml"))
    if path.stem != "base"
]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_resolves(group, choice):
    config = composed(f"{group}={choice}", "run_id=x")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def targets(node):
    """Every `_target_` with the keys beside it."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node._target_, [key for key in node if not key.startswith("_")]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, ListConfig):
        for value in node:
            yield from targets(value)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_key_beside_a_target_is_an_argument_of_it(group, choice):
    config = composed(f"{group}={choice}", "run_id=x")
    found = list(targets(config))
    assert found
    for target, keys in found:
        parameters = inspect.signature(get_object(target)).parameters
        accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert accepts_any or set(keys) <= set(parameters), target


@pytest.mark.parametrize(
    ("group", "choice"), [c for c in CHOICES if c[0] in ("model", "data", "experiment")]
)
def test_every_model_and_data_set_instantiates(group, choice, tmp_path):
    config = composed(f"{group}={choice}", "run_id=x", f"paths.cache={tmp_path}")
    with torch.device("meta"):  # weights of every experiment would take 400 MB
        instantiate(config.model)
    instantiate(config.data)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.name))
def test_every_yaml_says_what_it_is(path: Path):
    assert "#" in path.read_text(), path


def test_eval_composes():
    config = composed("checkpoint=x.ckpt", name="eval")
    assert config.split == "test"
