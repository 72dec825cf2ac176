"""The Lightning Trainer of a run, made from what a user chooses in the config."""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

from training.callbacks.compilation import Compilation
from training.callbacks.end_of_step import EndOfStep
from training.callbacks.images import Images
from training.callbacks.phases import Phases
from training.callbacks.validation import Validation
from training.phases import Phase
from training.run.checkpoint import AtomicCheckpointIO
from training.run.progress import Budget

log = logging.getLogger("strider")

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def make_trainer(
    output: str | Path,
    callbacks: Sequence[L.Callback],
    loggers: Sequence[Logger],
    phases: Sequence[Phase],
    *,
    accelerator: str,
    devices: int | str,
    nodes: int,
    strategy: str | Strategy,
    precision: str | None,
    max_steps: int | None,
    max_minutes: float | None,
    validate_every: int | None,
    log_every: int,
    gradient_clip: float | None,
    compile: bool | str,
) -> L.Trainer:
    """Make a Trainer that does what is asked and nothing on its own account.

    Args:
        output: the run's folder.
        callbacks: those beside the budget, the validation, the compilation, the phases and the end
            of a step, which are made here; in any order.
        loggers: get every metric that is logged.
        phases: see ``read_phases``.
        accelerator: ``"auto"`` (a GPU if there is one), ``"cpu"`` or ``"gpu"``.
        devices: how many on each node; ``"auto"`` is all GPUs, or one CPU process.
        nodes: how many machines.
        strategy: a name that Lightning knows, or an object.
        precision: ``"32-true"``, ``"bf16-mixed"``, ``"bf16-true"``; None: bf16-mixed on a GPU,
            32-true on a CPU.
        max_steps, max_minutes: see ``Budget``.
        validate_every: see ``Validation``.
        log_every: optimizer steps between logged metrics.
        gradient_clip: largest norm of the gradient over all parameters; None: no limit.
        compile: compile the model's blocks and its head; ``"auto"``: on a GPU.

    Raises:
        ValueError: if a GPU that is asked for is not there, or a setting is out of its range.
    """
    _silence_lightning()
    accelerator = _resolve_accelerator(accelerator, devices)
    precision = _resolve_precision(precision, accelerator)
    for name, value in [("log_every", log_every), ("gradient_clip", gradient_clip)]:
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}; set `trainer.{name}`.")
    budget, validation = Budget(max_steps, max_minutes), Validation(validate_every)
    for callback in callbacks:
        if not isinstance(callback, L.Callback):
            raise ValueError(
                f"each entry of callbacks must be a mapping whose _target_ is a callback, or null "
                f"to leave it out, got {callback!r}."
            )
    in_phases = Phases(phases)
    trainer = L.Trainer(
        default_root_dir=output,
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=_data_parallel() if strategy == "ddp" else strategy,
        precision=precision,
        max_steps=-1 if max_steps is None else max_steps,
        max_epochs=-1,
        gradient_clip_val=gradient_clip,
        log_every_n_steps=log_every,
        logger=list(loggers),
        callbacks=[
            budget,
            validation,
            in_phases,
            *([Compilation()] if resolve_compile(compile, accelerator) else []),
            *_around(EndOfStep(budget, validation, in_phases, callbacks), callbacks),
        ],
        plugins=[AtomicCheckpointIO()],
        check_val_every_n_epoch=sys.maxsize,  # an epoch never ends: `Validation` decides
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data are already split over ranks
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    rank_zero_only(log.info)(
        "%d x %s, precision %s", trainer.world_size, accelerator.upper(), precision
    )
    return trainer


def _resolve_accelerator(accelerator: str, devices: int | str) -> str:
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"trainer.accelerator must be auto, cpu or gpu, got {accelerator}.")
    if devices != "auto" and not (isinstance(devices, int) and devices > 0):
        raise ValueError(f"trainer.devices must be auto or at least 1, got {devices}.")
    found = torch.cuda.device_count()
    if accelerator == "auto":
        accelerator = "gpu" if found else "cpu"  # Apple's GPUs have no float64
    if accelerator == "gpu" and not found:
        raise ValueError(
            "trainer.accelerator=gpu needs a CUDA GPU and torch sees none; "
            "use `trainer=auto` or `trainer=cpu`, or check the driver with nvidia-smi."
        )
    if accelerator == "gpu" and isinstance(devices, int) and devices > found:
        raise ValueError(
            f"trainer.devices={devices} asks for more GPUs than the {found} that torch sees; "
            f"lower `trainer.devices`."
        )
    return accelerator


def _data_parallel() -> DDPStrategy:
    """Lightning's, for models all of whose parameters take part in every pass.

    A static graph is not promised, because phases change it; all that it would save here is a
    search for parameters that take no part, which is off as it is.
    """
    # Gradients are where they are summed: there is no copy of them.
    return DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True)


def _resolve_precision(precision: str | None, accelerator: str) -> str:
    if precision is None:
        return "bf16-mixed" if accelerator == "gpu" else "32-true"
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {', '.join(PRECISIONS)}, or null for what suits the device, "
            f"got {precision}; set `trainer.precision`."
        )
    return precision


def resolve_compile(choice: bool | str, accelerator: str) -> bool:
    """Whether to compile; where nothing is asked for, on a GPU.

    Raises:
        ValueError: if the choice is none.
    """
    if choice not in (True, False, "auto"):
        raise ValueError(f"trainer.compile must be auto, true or false, got {choice}.")
    return accelerator == "gpu" if choice == "auto" else bool(choice)


def _around(end_of_step: EndOfStep, callbacks: Sequence[L.Callback]) -> list[L.Callback]:
    """Averages are made before they are scored and saved; pictures are drawn of what is saved."""
    averaging = [c for c in callbacks if isinstance(c, WeightAveraging)]
    images = [c for c in callbacks if isinstance(c, Images)]
    others = [c for c in callbacks if not isinstance(c, WeightAveraging | Images)]
    return [*averaging, end_of_step, *others, *images]


def _silence_lightning() -> None:
    """Keep Lightning's remarks about choices that are made on purpose from the user."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers",  # our workers only read: data.workers says how many
        ".*`IterableDataset` has `__len__`",
        ".*recommended to use `self.log.*sync_dist=True",  # the task reduces sums itself
        ".*GPU available but not used",  # trainer=cpu
        ".*modules? in eval mode at the start of training",
        ".*FLOPs not found",  # an unknown card: `mfu` is left out
        ".*LeafSpec",  # a deprecation inside Lightning
        ".*AccumulateGrad node's stream does not match",  # Lightning wraps for DDP on a side stream
    ):
        warnings.filterwarnings("ignore", message=message)
