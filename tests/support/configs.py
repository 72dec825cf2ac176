"""Composing the real configuration in tests."""

from pathlib import Path

from hydra import compose, initialize
from omegaconf import DictConfig

CONF = Path(__file__).parents[2] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "base")
SMALL = ["model.dim=32", "model.heads=2", "model.layers=2", "data.length=64"]
BOTH_SIDES = [  # the attention of a small encoder
    "+model.attention.both={_target_: models.attention.pattern.PatternAttention, _partial_: true, "
    "pattern: 'window(8, 8) | global_tokens(2)'}",
    "model.layout=[both]",
]


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """What `python train.py OVERRIDES` (or eval.py) would run with."""
    with initialize(version_base="1.3", config_path="../../conf"):
        return compose(name, overrides=list(overrides))
