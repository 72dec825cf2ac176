"""A mistake of the user, found before training begins, is one sentence and not a traceback."""

import os
import sys
from types import TracebackType
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

USER_ERRORS = (
    ValueError, OSError, FloatingPointError, OmegaConfBaseException, MisconfigurationException,
)  # fmt: skip
EXIT_STATUS = 2


class UserErrors(L.Callback):
    """Turns errors in its ``with`` block into ``error: ...`` on stderr and exit status 2.

    As a callback of the trainer it learns when the first training step begins: from then on, and
    always under HYDRA_FULL_ERROR=1, errors keep their traceback.

    Example::

        with UserErrors() as errors:
            trainer = make_trainer(callbacks=[..., errors])
            trainer.fit(...)
    """

    def __init__(self) -> None:
        self.training_began = False

    def __enter__(self) -> "UserErrors":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.training_began or os.environ.get("HYDRA_FULL_ERROR") == "1":
            return
        if sentence := one_sentence(error):
            print(f"error: {sentence}", file=sys.stderr)
            sys.exit(EXIT_STATUS)

    def on_train_batch_start(self, *_: Any) -> None:
        self.training_began = True


def one_sentence(error: BaseException | None) -> str | None:
    """What to tell the user about ``error``, or None if it is not about anything they gave."""
    configured = isinstance(error, InstantiationException)
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key.removeprefix("task.")  # which only refers to the other sections
        choose = ", or choose another file of its group" if "." in key else ""
        return f"`{key}` has no value; set {key}=...{choose}."
    if isinstance(error, InterpolationResolutionError):
        key = error.full_key.removeprefix("task.")
        return (
            f"`{key}` refers to {error.child_node}, which has no value; set that, or choose "
            "another file of its group."
        )
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    if isinstance(error, (*USER_ERRORS, InstantiationException)):
        return " ".join(str(error).split())
    if configured and not isinstance(error, ImportError):  # a new file of the user's may be wrong
        return f"what is configured cannot be built: {type(error).__name__}: {error}"
    return None
