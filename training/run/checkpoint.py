"""Checkpoints: a crash while writing loses none, and reading a stranger's never runs code."""

import importlib
import inspect
import os
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf
from torch import Tensor

from training.run.migrations import migrate, migrate_checkpoint

# Where the classes of a section of a saved config may be defined.
PACKAGES = {"model": "models", "data": "data"}
# Functions are instantiated from here only: they draw initial weights, and do nothing else.
INITIALISATION = "models.initialisation"
# What Hydra reads in a node besides arguments; `_args_` would call with positional arguments.
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint only by one that is on the disk and readable.

    The new file is written under another name beside the old one, synced, opened again, and
    renamed over it. Whatever fails, the previous checkpoint is left as it was.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            OSError: if the disk is full, the folder cannot be written, or the file did not arrive.
        """
        assert storage_options is None, "checkpoints are local files"
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            _load(partial, mmap=True)
            partial.replace(path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OSError(
                f"the checkpoint {path} could not be written ({reason}); make room or allow "
                "writing there and start again, the last complete checkpoint will be resumed."
            ) from error
        finally:
            with suppress(OSError):  # not there, or the error above says why
                partial.unlink()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain values, whatever Lightning asks for.

        Raises:
            FileNotFoundError, ValueError: see `read_checkpoint`.
        """
        return migrate_checkpoint(_read(Path(path), mmap=False))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a run's checkpoint on the CPU, without running code from it.

    Returns:
        Lightning's dictionary, with the run's configuration as YAML text under ``config``.
        Tensors are mapped from the file and read when they are used.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is incomplete, no checkpoint of a run, or would run code when loaded.
    """
    checkpoint = migrate_checkpoint(_read(Path(path), mmap=True))
    if not isinstance(checkpoint.get("config"), str):
        raise ValueError(
            f"the checkpoint {path} does not say how its model was configured; "
            "use a checkpoint that train.py wrote."
        )
    return checkpoint


def model_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters of the model in a checkpoint, averaged ones if the run averaged them."""
    prefix = "model."
    weights = checkpoint["state_dict"].items()
    return {name.removeprefix(prefix): w for name, w in weights if name.startswith(prefix)}


def rebuild(
    config_text: str,
    section: str,
    *,
    changes: Mapping[str, Any] | None = None,
    trust: Sequence[str] = (),
) -> Any:
    """Instantiate one section of a saved configuration, which need not be trusted.

    Args:
        config_text: the resolved configuration, YAML text.
        section: ``"model"`` or ``"data"``.
        changes: values that replace some of the section's.
        trust: packages of the user's own whose classes may be instantiated, too.

    Raises:
        ValueError: if the text is not such a configuration, or names anything but classes that
            are defined in the package of that section or in those of ``trust``.
    """
    config = parse_config(config_text)
    if not isinstance(config.get(section), dict):
        raise ValueError(f"the saved configuration has no section `{section}`.")
    for package in trust:
        _require_package(package)
    packages = (PACKAGES[section], *trust)
    for node in (config[section], changes or {}):
        _check(node, section, packages)
    return instantiate(OmegaConf.merge(config[section], changes or {}))


def of_phase(checkpoint: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """The phase that a checkpoint was written in: its length, and what it changes of the model.

    Returns:
        Tokens in a window, None where it is that of the data; and values of the section `model`.
    """
    phase = checkpoint.get("phase", {"length": None, "model": {}})
    if phase.get("windows") is None:
        return phase["length"], phase.get("model", {})
    # Phases had one window a layer, of the attention that is called longformer.
    return phase["length"], {"attention": {"longformer": {"window": phase["windows"]}}}


def parse_config(text: str) -> dict[str, Any]:
    """Read a saved configuration, which need not be trusted, in today's form.

    Raises:
        ValueError: if it is not a mapping in plain YAML, without aliases (a few of which, nested,
            stand for more than any memory holds).
    """
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        plain = not any(isinstance(event, yaml.AliasEvent) for event in events)
        config = yaml.safe_load(text) if plain else None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError("the saved configuration is not plain YAML; it was refused.") from error
    if not isinstance(config, dict):
        raise ValueError("the saved configuration is not a plain mapping; it was refused.")
    return migrate(config)


def _check(node: Any, key: str, packages: Sequence[str]) -> None:
    """Refuse whatever in a node could make Hydra do more than build objects of ``packages``."""
    if isinstance(node, dict):
        for name, value in node.items():
            _check(name, key, packages)
            _check(value, f"{key}.{name}", packages)
            hidden = isinstance(name, str) and name.startswith("_") and name.endswith("_")
            if hidden and name not in HYDRA_KEYS:
                raise ValueError(f"the saved configuration was refused: `{key}` has a `{name}`.")
        if "_target_" in node and not any(_is_defined_in(p, node["_target_"]) for p in packages):
            raise ValueError(
                f"the saved configuration was refused: `{key}._target_` is {node['_target_']!r}, "
                f"and only classes defined in {' and '.join(map(repr, packages))} are "
                "instantiated; if it is a class of a package of your own, add trust=[PACKAGE]."
            )
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _check(value, f"{key}[{index}]", packages)
    elif isinstance(node, str) and "${" in node:
        raise ValueError(f"the saved configuration was refused: `{key}` interpolates {node!r}.")


def _require_package(name: str) -> None:
    """Import a package that the user trusts, so that a typing error is not read as distrust."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"trust names {name!r}, which cannot be imported ({error}); name a package, not a "
            "class in it, and put the folder that it is in on PYTHONPATH."
        ) from error


def _is_defined_in(package: str, target: Any) -> bool:
    """Whether ``target`` is the path of a class (or initialisation) that is *defined* in there.

    A prefix is not enough: `models.transformer.torch.load` has ours and is torch's.
    """
    if not isinstance(target, str) or not target.startswith(f"{package}."):
        return False
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ModuleNotFoundError:
        return False
    known = inspect.isfunction if module_name == INITIALISATION else inspect.isclass
    return known(found) and f"{found.__module__}.".startswith(f"{package}.")


def _read(path: Path, mmap: bool) -> dict[str, Any]:
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.ckpt"))
        known = f"one of {', '.join(beside)}" if beside else "a .ckpt file"
        raise FileNotFoundError(f"there is no checkpoint {path}; give the path of {known}.")
    try:
        checkpoint = _load(path, mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the checkpoint {path} was refused because it holds more than tensors and plain "
            "values, and loading that can run code; use a checkpoint that train.py wrote."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(
            f"the file {path} is not a complete checkpoint; use another one, such as "
            "best.ckpt or last.ckpt of the same run."
        ) from error
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(
            f"the file {path} holds no training state; use a checkpoint that train.py wrote."
        )
    return checkpoint


def _load(path: Path, mmap: bool) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)  # a rename is on the disk once its folder is
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
