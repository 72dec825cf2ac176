"""What a configuration cannot be, found before anything is built: groups, types, seeds, folders."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from omegaconf import DictConfig, OmegaConf

NAMES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text",
    dict: "a mapping", types.NoneType: "null",
}  # fmt: skip
ITEMS = {int: "whole numbers", float: "numbers", str: "names"}
LARGEST_SEED = 2**32 - 1  # of numpy
CONF = Path(__file__).parents[2] / "conf"
GROUPS = {  # of conf/train.yaml, with the section that a choice fills in
    "model": "model", "data": "data", "objective": "task.objective", "optimizer": "optimizer",
    "schedule": "schedule", "trainer": "trainer", "callbacks": "callbacks", "logger": "logger",
    "paths": "paths",
}  # fmt: skip


def check_groups(config: DictConfig) -> None:
    """Refuse a configuration in which a group has no choice, as with `logger=null`.

    Raises:
        ValueError: for the first such group.
    """
    for group, section in GROUPS.items():
        if not _chosen(group, OmegaConf.select(config, section)):
            choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            names = ", ".join(name for name in choices if name != "base")
            raise ValueError(f"{group} must be one of {names}, got null.")


def _chosen(group: str, section: Any) -> bool:
    """Whether a file of the group is in there, not only what an experiment adds to one."""
    if not isinstance(section, DictConfig):
        return False
    if group == "paths":
        return "cache" in section
    parts = section.values() if group == "callbacks" else [section]
    return all("_target_" in part for part in parts if isinstance(part, DictConfig))


def check_types(config: DictConfig) -> None:
    """Compare each value with what the constructor that its `_target_` names is annotated with.

    Only plain types are compared (whole numbers, numbers, text, true or false, null, lists of
    these, and mappings), and only where the annotation lists nothing else.

    Raises:
        ValueError: for the first value of another type.
        MissingMandatoryValue: for the first key without a value.
    """
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    seed = plain["seed"]
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(
            f"seed must be a whole number from 0 to {LARGEST_SEED:,}, got {_given(seed)}."
        )
    for name, path in plain["paths"].items():
        if not isinstance(path, str) or not path:
            raise ValueError(f"paths.{name} must be the path of a folder, got {_given(path)}.")
    # Last, because it refers to other sections, by whose names the user knows their keys.
    plain["task"] = plain.pop("task")
    _check(plain, "")


def check_documents(config: DictConfig) -> None:
    """Refuse global vectors, which all tokens see, where documents do not see each other.

    Raises:
        ValueError: if the model has them and the data are packed.
    """
    vectors = OmegaConf.select(config, "model.embedding.global_vectors")
    if vectors and config.data.documents == "pack":
        raise ValueError(
            f"global vectors see all tokens, and data.documents=pack keeps documents apart, got "
            f"model.embedding.global_vectors={vectors}; set it to 0, or data.documents=split."
        )


def check_arguments(target: Callable[..., Any], values: Mapping[str, Any], key: str = "") -> None:
    """Compare values with the plain types that ``target`` is annotated with; see `check_types`."""
    allowed = _plain_arguments(target)
    for name in allowed.keys() & values.keys():
        if not _fits(values[name], allowed[name]):
            wanted = " or ".join(map(_called, allowed[name]))
            place = f"{key}.{name}" if key else name
            raise ValueError(f"{place} must be {wanted}, got {_given(values[name])}.")


def _given(value: Any) -> str:
    return "null" if value is None else repr(value)


def _check(node: Any, key: str) -> None:
    if isinstance(node, list):
        for n, item in enumerate(node):
            _check(item, f"{key}[{n}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        check_arguments(_target(node["_target_"], key), node, key)
    for name, value in node.items():
        _check(value, f"{key}.{name}" if key else name)


def _target(name: Any, key: str) -> Callable[..., Any]:
    target = locate(name) if isinstance(name, str) else None
    if not callable(target):
        raise ValueError(
            f"{key}._target_ must be the place of a class or function, such as "
            f"training.optim.optimizers.adamw, got {_given(name)}."
        )
    return target


def _plain_arguments(target: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """Arguments of a function or class that take plain types only, with those of each."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    plain = {}
    for name, hint in hints.items():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = tuple(map(_as_given, typing.get_args(hint) if union else (hint,)))
        if all(option in NAMES or _items(option) for option in options):
            plain[name] = options
    return plain


def _as_given(option: Any) -> Any:
    """A function is made of a mapping with its `_target_`."""
    return dict if typing.get_origin(option) in (Callable, Mapping) else option


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
