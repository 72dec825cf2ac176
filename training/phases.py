"""Training in phases: parts of one run with a length, batch, rate and windows of their own."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from training.config.validate import check_arguments
from training.run.progress import Budget, count_batches_from_steps, recount_batches

log = logging.getLogger("strider")

DEFAULT_STEPS = 10_000  # where trainer.max_steps is auto and there are no phases
KEYS = ("steps", "length", "batch_tokens", "micro_tokens", "lr", "windows")


@dataclass(frozen=True)
class Phase:
    """A part of a run; a run without phases is one.

    Args:
        key: where it stands in the configuration.
        first_step: optimizer steps done before it.
        steps: optimizer steps in it; None: until the run ends.
        length: tokens in a window.
        batch_tokens: tokens in an optimizer step, over all devices.
        micro_tokens: most tokens in a forward pass of one device; None: no limit, one pass.
        lr: peak of the learning rate that `optimizer.lr` is; None: that of the optimizer.
        lr_factor: share of `optimizer.lr` that this is, by which all rates are scaled.
        windows: the attention window of each layer, in tokens; None: as the model was made.
    """

    key: str
    first_step: int
    steps: int | None
    length: int
    batch_tokens: int
    micro_tokens: int | None
    lr: float | None
    lr_factor: float
    windows: Sequence[int] | None

    @property
    def batching(self) -> tuple[str, int, int, int, int | None]:
        """What the data need to know of it."""
        return self.key, self.first_step, self.length, self.batch_tokens, self.micro_tokens


def read_phases(config: DictConfig) -> list[Phase]:
    """The phases of a run, from its configuration; fills in ``config.trainer.max_steps``.

    A key that a phase leaves out has the value of the run (`data.length`, `optimizer.lr`, ...).

    Raises:
        ValueError: if a phase has an unknown key, a value of the wrong type or range, or none for
            `steps`, or the phases contradict what limits the run.
    """
    data, trainer = config.data, config.trainer
    if config.phases is None:
        if trainer.max_steps == "auto":
            trainer.max_steps = DEFAULT_STEPS
        sizes = data.length, data.batch_tokens, data.micro_tokens
        return [Phase("data", 0, None, *sizes, lr=None, lr_factor=1.0, windows=None)]
    if not isinstance(config.phases, ListConfig) or not config.phases:
        raise ValueError(
            "phases must be null or a list such as [{steps: 1000, length: 2048}], got "
            f"{config.phases}."
        )
    given = OmegaConf.to_container(config.phases, resolve=True)
    base = config.optimizer.lr
    _require_positive("optimizer", "lr", base)
    defaults = {key: data[key] for key in ("length", "batch_tokens", "micro_tokens")}
    phases, first = [], 0
    for n, values in enumerate(given):
        key = f"phases[{n}]"
        values = _checked(key, values, {**defaults, "lr": base, "windows": None})
        phases.append(Phase(key, first, lr_factor=values["lr"] / base, **values))
        first += values["steps"]
    if len({phase.windows is None for phase in phases}) > 1:
        raise ValueError(
            "all phases must have windows or none, got some of each; give `windows` to all of them."
        )
    if trainer.max_minutes is not None or trainer.max_steps not in ("auto", None, first):
        raise ValueError(
            f"the phases say how long the run is, {first:,} steps, got trainer.max_steps="
            f"{trainer.max_steps} and trainer.max_minutes={trainer.max_minutes}; set both to null, "
            f"or phases=null."
        )
    trainer.max_steps = first
    return phases


def _checked(key: str, given: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """The values of a phase by `KEYS`; the data and the model check those that they take."""
    if not isinstance(given, dict):
        raise ValueError(f"{key} must be a mapping such as {{steps: 1000}}, got {given!r}.")
    if unknown := [name for name in given if name not in KEYS]:
        raise ValueError(f"{key} has no key `{unknown[0]}`; its keys are {', '.join(KEYS)}.")
    if given.get("steps") is None:
        raise ValueError(f"{key} does not say how long it is; give it `steps`.")
    values = defaults | given
    check_arguments(Phase, values, key)
    for name in ("steps", "lr"):
        _require_positive(key, name, values[name])
    return values


def _require_positive(key: str, name: str, value: Any) -> None:
    check_arguments(Phase, {name: value}, key)
    if value is None or not 0 < value < math.inf:
        raise ValueError(f"{key}.{name} must be positive, got {value}.")


def check_model(phases: Sequence[Phase], model: nn.Module) -> None:
    """Try the length and windows of every phase on the model, which is left with the first windows.

    Raises:
        ValueError: if it cannot take them.
    """
    for phase in reversed(phases):
        try:
            _set_windows(phase, model)
            model.check_length(phase.length)
        except ValueError as error:  # a model does not know the phases
            raise ValueError(f"{phase.key}: {error}") from error


def _set_windows(phase: Phase, model: nn.Module) -> None:
    if phase.windows is None:
        return
    if not hasattr(model, "set_windows"):
        raise ValueError(
            f"the phases have windows, and {type(model).__name__} has no `set_windows` to take "
            "them; leave them out, or choose another model."
        )
    model.set_windows(phase.windows)


class Phases(L.Callback):
    """Moves the data, the accumulation and the model's windows from one phase to the next.

    A phase begins after all that happens at the end of the one before: what is validated and saved
    there belongs to the old one. This must therefore be the last callback of the trainer. The task
    asks it for the learning rate. The state of the optimizer is carried over.

    Args:
        phases: at least one, in their order.
    """

    def __init__(self, phases: Sequence[Phase]):
        self.phases = list(phases)
        self.index = 0

    @staticmethod
    def of(trainer: L.Trainer) -> "Phases":
        """The phases among a trainer's callbacks."""
        return next(c for c in trainer.callbacks if isinstance(c, Phases))

    @property
    def current(self) -> Phase:
        return self.phases[self.index]

    def done_at(self, step: int) -> bool:
        """Whether ``step`` optimizer steps complete the current phase."""
        return self.current.steps == step - self.current.first_step

    def schedule_place(self, trainer: L.Trainer) -> tuple[int, float]:
        """Steps done in the current phase, and the share of it that is done, for a schedule."""
        step = trainer.global_step - self.current.first_step
        if self.current.steps is None:
            return step, Budget.of(trainer).progress
        return step, step / self.current.steps

    def setup(self, trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
        self._enter(0, trainer)

    def on_load_checkpoint(
        self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        firsts = [phase.first_step for phase in self.phases]
        self._enter(sum(first <= checkpoint["global_step"] for first in firsts) - 1, trainer)
        count_batches_from_steps(checkpoint, trainer.accumulate_grad_batches)

    def on_save_checkpoint(
        self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["phase"] = {"length": self.current.length, "windows": self.current.windows}

    def on_fit_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._announce()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        last = self.index == len(self.phases) - 1
        if not last and not trainer.should_stop and self.done_at(trainer.global_step):
            self._enter(self.index + 1, trainer)
            recount_batches(trainer)
            self._announce()

    def _enter(self, index: int, trainer: L.Trainer) -> None:
        self.index = index
        data = trainer.datamodule
        data.phase = index
        trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
        # Lightning keeps the loader of the validation, whose windows are of another length.
        trainer.fit_loop.epoch_loop.val_loop._combined_loader = None
        _set_windows(self.current, trainer.lightning_module.model)

    @rank_zero_only
    def _announce(self) -> None:
        phase = self.current
        if phase.steps is None:
            return  # the run has no phases
        windows = "" if phase.windows is None else f", attention windows {list(phase.windows)}"
        log.info(
            "phase %d of %d: %s steps after step %s, windows of %s tokens, %s tokens a step, "
            "learning rate %g%s",
            self.index + 1,
            len(self.phases),
            f"{phase.steps:,}",
            f"{phase.first_step:,}",
            f"{phase.length:,}",
            f"{phase.batch_tokens:,}",
            phase.lr,
            windows,
        )
