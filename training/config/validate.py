"""What a configuration cannot be, found before anything is built: groups, keys, types, folders."""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from omegaconf import DictConfig, OmegaConf

from training.config.moved import moved_key, moved_target

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
    """Compare keys and values with the signatures of what they are given to.

    See `check_targets` for the constructors that each `_target_` names.

    Raises:
        ValueError: for the first key that is unknown or left out, or value of another type.
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
    check_targets(plain)


def check_targets(node: Any, key: str = "") -> None:
    """Compare every mapping that has a `_target_` with the signature of that.

    Its keys must be arguments of the target, and all those without a default; with `_partial_`, the
    code supplies those that may be positional. Of the values only plain types are compared (whole
    numbers, numbers, text, true or false, null, lists of these, and mappings), and only where the
    annotation lists nothing else.

    Args:
        node: a part of the configuration, as plain mappings and lists.
        key: where it stands.

    Raises:
        ValueError: for the first difference.
    """
    if isinstance(node, list):
        for n, item in enumerate(node):
            check_targets(item, f"{key}[{n}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        target = _target(node["_target_"], key)
        _check_keys(target, node, key)
        check_arguments(target, node, key)
    for name, value in node.items():
        check_targets(value, f"{key}.{name}" if key else name)


def _check_keys(target: Callable[..., Any], node: Mapping[str, Any], key: str) -> None:
    parameters = inspect.signature(target).parameters.values()
    place = f"{key}: " if key else ""
    given = [name for name in node if not name.startswith("_")]
    known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in given:
        if name not in known and not takes_any:
            if now := moved_key(f"{key}.{name}"):
                raise ValueError(f"{key}.{name} has moved; write {now} instead.")
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"its keys are {', '.join(known)}."
            raise ValueError(f"{place}{target.__name__} has no key `{name}`; {hint}")
    needed = [
        p.name for p in parameters
        if p.default is p.empty and p.name in known and p.name not in given
        and (p.kind is p.KEYWORD_ONLY or not node.get("_partial_"))
    ]  # fmt: skip
    if needed and "_args_" not in node:
        raise ValueError(
            f"{place}{target.__name__} lacks {', '.join(map(repr, needed))}; set what is a key of "
            "the configuration, and `_partial_: true` where the code supplies the rest."
        )


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
    """Compare values with the plain types of the arguments of ``target``; see `check_targets`."""
    allowed = _plain_arguments(target)
    for name in allowed.keys() & values.keys():
        if not _fits(values[name], allowed[name]):
            wanted = " or ".join(map(_called, allowed[name]))
            place = f"{key}.{name}" if key else name
            raise ValueError(f"{place} must be {wanted}, got {_given(values[name])}.")


def _given(value: Any) -> str:
    return "null" if value is None else repr(value)


def _target(name: Any, key: str) -> Callable[..., Any]:
    target = locate(name) if isinstance(name, str) else None
    if target is None and isinstance(name, str) and (now := moved_target(name)):
        raise ValueError(f"{key}._target_: {name} has moved; write {now} instead.")
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
