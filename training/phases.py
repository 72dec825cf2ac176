"""Training in phases: parts of one run, each the run's configuration with some values changed."""

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from data.batches.batching import Batching
from training.config.messages import one_sentence
from training.config.moved import OLD_PHASE_KEYS, moved_key
from training.config.validate import check_arguments, check_targets
from training.model_settings import adopt_settings

DEFAULT_STEPS = 10_000  # where trainer.max_steps is auto and there are no phases
# The keys of each section that a phase may change; None: all, of `model` those that leave its
# weights as they are (training/model_settings.py), but for `stack`. Weights and samples must go on.
MAY_CHANGE = {
    "data": ("length", "batch_tokens", "micro_tokens"), "model": None, "optimizer": None,
    "schedule": None, "trainer": ("gradient_clip",),
}  # fmt: skip
CHANGEABLE = (
    "data.length, data.batch_tokens, data.micro_tokens, model.*, optimizer.*, schedule.* and "
    "trainer.gradient_clip"
)


@dataclass(frozen=True)
class Phase:
    """A part of a run; a run without phases is one.

    Args:
        key: where it stands in the configuration, for messages.
        batching: its first step, and how its tokens are cut into windows and forward passes.
        steps: optimizer steps in it; None: until the run ends.
        changes: by section, the values that differ from those of the run.
        config: the run's configuration with these changes; None: the run has no phases.
    """

    key: str
    batching: Batching
    steps: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    config: DictConfig | None = None

    def make_model(self) -> nn.Module:
        """The model that this phase would begin with, on the meta device: it has no weights."""
        with torch.device("meta"):
            return instantiate(self.config.model)


def read_phases(config: DictConfig) -> list[Phase]:
    """The phases of a run, from its configuration; fills in ``config.trainer.max_steps``.

    Raises:
        ValueError: if a phase changes what it must not, has a value of the wrong type or range, or
            none for `steps`, or the phases contradict what limits the run.
    """
    trainer = config.trainer
    if config.phases is None:
        if trainer.max_steps == "auto":
            trainer.max_steps = DEFAULT_STEPS
        return [Phase("data", _batching("data", 0, config))]
    if not isinstance(config.phases, ListConfig) or not config.phases:
        raise ValueError(
            "phases must be null or a list such as [{steps: 1000, data: {length: 2048}}], got "
            f"{config.phases}."
        )
    phases, first = [], 0
    for n, given in enumerate(OmegaConf.to_container(config.phases, resolve=True)):
        phases.append(_read_phase(f"phases[{n}]", first, given, config))
        first += phases[-1].steps
    if trainer.max_minutes is not None or trainer.max_steps not in ("auto", None, first):
        raise ValueError(
            f"the phases say how long the run is, {first:,} steps, got trainer.max_steps="
            f"{trainer.max_steps} and trainer.max_minutes={trainer.max_minutes}; set both to null, "
            f"or phases=null."
        )
    trainer.max_steps = first
    return phases


def check_phases(phases: list[Phase], model: nn.Module) -> None:
    """Try every phase on the model, which is left with the settings of the first one.

    Raises:
        ValueError: if the model, the optimizer or the schedule cannot be as a phase wants them.
    """
    for phase in reversed(phases):
        with _named(phase.key):
            if phase.config is not None:
                sections = _sections(phase.config)
                check_targets({name: sections[name] for name in ("model", "optimizer", "schedule")})
                adopt_settings(model, phase.make_model())
                instantiate(phase.config.optimizer)(model)
                instantiate(phase.config.schedule)(0, 0.0)
            model.check_length(phase.batching.length)


def _batching(key: str, first_step: int, config: DictConfig) -> Batching:
    sizes = {name: config.data[name] for name in MAY_CHANGE["data"]}
    check_arguments(Batching, sizes, key)
    return Batching(key, first_step, **sizes)


def _read_phase(key: str, first_step: int, given: Any, config: DictConfig) -> Phase:
    if not isinstance(given, dict):
        raise ValueError(f"{key} must be a mapping such as {{steps: 1000}}, got {given!r}.")
    steps = given.pop("steps", None)
    if steps is None:
        raise ValueError(f"{key} does not say how long it is; give it `steps`.")
    if type(steps) is not int or steps < 1:
        raise ValueError(f"{key}.steps must be a whole number of at least 1, got {steps!r}.")
    _check_keys(key, given, config)
    merged = OmegaConf.merge(config, given)
    clip = merged.trainer.gradient_clip
    if clip is not None and not (type(clip) in (int, float) and 0 < clip < math.inf):
        raise ValueError(f"{key}.trainer.gradient_clip must be positive or null, got {clip!r}.")
    changes = _differences(_sections(config), _sections(merged))
    return Phase(key, _batching(f"{key}.data", first_step, merged), steps, changes, merged)


def _check_keys(key: str, given: dict[str, Any], config: DictConfig) -> None:
    """Refuse what a phase must not change, and what the run does not have."""
    for section, values in given.items():
        if section in OLD_PHASE_KEYS:
            raise ValueError(
                f"{key}.{section} is written as {OLD_PHASE_KEYS[section]} now, as in the "
                "configuration of the run."
            )
        if section not in MAY_CHANGE:
            raise ValueError(f"{key}.{section} cannot change in a run; phases change {CHANGEABLE}.")
        if not isinstance(values, dict):
            given = "null" if values is None else repr(values)
            raise ValueError(f"{key}.{section} must be a mapping, got {given}.")
        _require_known(f"{key}.{section}", values, config[section])
        allowed = MAY_CHANGE[section] or values
        for name in values:
            fixed = name.startswith("_") or (section, name) == ("model", "stack")
            if fixed or name not in allowed:
                raise ValueError(
                    f"{key}.{section}.{name} cannot change in a run; phases change {CHANGEABLE}."
                )


def _require_known(key: str, given: Mapping[str, Any], known: DictConfig) -> None:
    """Refuse a key that the run does not have, and would not read."""
    for name, value in given.items():
        if name not in known:
            if now := moved_key(f"{key}.{name}".partition(".")[2]):
                raise ValueError(f"{key}.{name} has moved; write {now} instead.")
            close = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"its keys are {', '.join(known)}."
            raise ValueError(f"{key} has no key `{name}`; {hint}")
        if isinstance(value, dict) and isinstance(known[name], DictConfig):
            _require_known(f"{key}.{name}", value, known[name])


def _sections(config: DictConfig) -> dict[str, Any]:
    return {name: OmegaConf.to_container(config[name], resolve=True) for name in MAY_CHANGE}


def _differences(before: Any, after: Any) -> Any:
    """The part of ``after`` that is not in ``before``, by its keys."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return after
    return {
        name: _differences(before.get(name), value)
        for name, value in after.items()
        if value != before.get(name)
    }


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Put the phase's key before a mistake: models and optimizers do not know their phase."""
    try:
        yield
    except (ValueError, InstantiationException) as error:
        raise ValueError(f"{key}: {one_sentence(error) or error}") from error
