"""Values of the configuration that are of the wrong type, found before anything is built."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

PLAIN = (bool, int, float, str, types.NoneType)
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check_types(config: DictConfig) -> None:
    """Compare each value with what the constructor that its `_target_` names is annotated with.

    Only plain types are compared (whole numbers, numbers, text, true or false, null), and only
    where the annotation lists nothing else.

    Raises:
        ValueError: for the first value of another type.
    """
    _check(OmegaConf.to_container(config, resolve=True), "")


def check_arguments(target: Callable[..., Any], values: Mapping[str, Any], key: str = "") -> None:
    """Compare values with the plain types that ``target`` is annotated with; see `check_types`."""
    allowed = _plain_arguments(target)
    for name in allowed.keys() & values.keys():
        if not _fits(values[name], allowed[name]):
            wanted = [NAMES[t] for t in NAMES if t in allowed[name]]
            wanted += ["null"] * (types.NoneType in allowed[name])
            place = f"{key}.{name}" if key else name
            raise ValueError(f"{place} must be {' or '.join(wanted)}, got {values[name]!r}.")


def _check(node: Any, key: str) -> None:
    if isinstance(node, list):
        for n, item in enumerate(node):
            _check(item, f"{key}[{n}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        check_arguments(get_object(node["_target_"]), node, key)
    for name, value in node.items():
        _check(value, f"{key}.{name}" if key else name)


def _plain_arguments(target: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """Arguments of a function or class that take plain values only, with the types of each."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    plain = {}
    for name, hint in hints.items():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if union else (hint,)
        if all(option in PLAIN for option in options):
            plain[name] = options
    return plain


def _fits(value: Any, options: tuple[type, ...]) -> bool:
    if type(value) is int and float in options:
        return True
    if type(value) in (int, float) and str in options:  # a text such as `16`, as yaml reads it
        return True
    return type(value) in options
