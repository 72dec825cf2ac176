"""Values of the configuration that are of the wrong type, found before anything is built."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

PLAIN = (bool, int, float, str, types.NoneType)
NAMES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text",
    types.NoneType: "null",
}  # fmt: skip
ITEMS = {int: "whole numbers", float: "numbers", str: "names"}


def check_types(config: DictConfig) -> None:
    """Compare each value with what the constructor that its `_target_` names is annotated with.

    Only plain types are compared (whole numbers, numbers, text, true or false, null, and lists of
    these), and only where the annotation lists nothing else.

    Raises:
        ValueError: for the first value of another type.
        MissingMandatoryValue: for the first key without a value.
    """
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    # Last, because it refers to other sections, by whose names the user knows their keys.
    plain["task"] = plain.pop("task")
    _check(plain, "")


def check_arguments(target: Callable[..., Any], values: Mapping[str, Any], key: str = "") -> None:
    """Compare values with the plain types that ``target`` is annotated with; see `check_types`."""
    allowed = _plain_arguments(target)
    for name in allowed.keys() & values.keys():
        if not _fits(values[name], allowed[name]):
            wanted = " or ".join(map(_called, allowed[name]))
            place = f"{key}.{name}" if key else name
            given = "null" if values[name] is None else repr(values[name])
            raise ValueError(f"{place} must be {wanted}, got {given}.")


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


def _plain_arguments(target: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """Arguments of a function or class that take plain values only, with the types of each."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    plain = {}
    for name, hint in hints.items():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if union else (hint,)
        if all(option in PLAIN or _items(option) for option in options):
            plain[name] = options
    return plain


def _items(option: Any) -> tuple[type, ...]:
    """The plain types of a list's items, one for all or one for each; empty if it is no list."""
    kind, items = typing.get_origin(option), typing.get_args(option)
    return items if kind in (Sequence, tuple) and all(item in ITEMS for item in items) else ()


def _called(option: Any) -> str:
    if items := _items(option):
        number = f"{len(items)} " if typing.get_origin(option) is tuple else ""
        return f"a list of {number}{ITEMS[items[0]]}"
    return NAMES[option]


def _fits(value: Any, options: tuple[Any, ...]) -> bool:
    if isinstance(value, list):
        return any(_fits_items(value, option) for option in options if _items(option))
    if type(value) is int and float in options:
        return True
    if type(value) in (int, float) and str in options:  # a text such as `16`, as yaml reads it
        return True
    return type(value) in options


def _fits_items(values: list, option: Any) -> bool:
    items = _items(option)
    if typing.get_origin(option) is Sequence:
        items = items * len(values)
    return len(values) == len(items) and all(
        type(value) is item or (type(value), item) == (int, float)
        for value, item in zip(values, items, strict=True)
    )
