"""One YAML file plus dotted overrides (`--optim.learning_rate 1e-4`) make a `Config`.

A file may extend another one (`extends: rgrl.yaml`, beside it) and say only what differs. An unknown key, a value of
the wrong type or a setting that cannot work raises `ConfigError` with one line: what is wrong and what would be right.
"""

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from rgrl.config.rules import check
from rgrl.config.schema import Config
from rgrl.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The file at `path` with `overrides` (["--a.b", "value", "--c.d=value", ...]) laid over it, checked.

    Raises `ConfigError`.
    """
    tree = _read(Path(path))
    for key, value in _parse_overrides(overrides or []):
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--{key}: `{parent}` is a value, not a section")
        node[last] = value
    config = _build(Config, tree, "")
    check(config)
    return config


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in a file, laid over those of the file that its key `extends` names."""
    if not path.is_file():
        by = f" (which {below[-1]} extends)" if below else ""
        raise ConfigError(f"--config {path}{by}: no such file")
    if path.resolve() in below:
        raise ConfigError(f"{path} extends itself, by way of {' and '.join(map(str, below))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as `model:` and `run:`, not a {type(tree).__name__}")
    parent = tree.pop("extends", None)
    return tree if parent is None else _overlay(_read(path.parent / str(parent), (*below, path.resolve())), tree)


def _overlay(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with `changes`, section by section."""
    return tree | {
        key: _overlay(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        for key, value in changes.items()
    }


def _parse_overrides(words: list[str]) -> list[tuple[str, Any]]:
    pairs, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"expected --section.key value, got {word!r}")
        key, given, text = word[2:].partition("=")
        if not given:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            text = queue.pop(0)
        try:
            pairs.append((key, yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: cannot read the value {text!r}") from error
    return pairs


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"`{prefix[:-1]}` is a section with keys of its own, not the value {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            known = [prefix + name for name in hints]
            near = difflib.get_close_matches(f"{prefix}{key}", known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key `{prefix}{key}`; did you mean `{near}`?")
        kind = hints[key]
        is_section = dataclasses.is_dataclass(kind)
        values[key] = _build(kind, value, f"{prefix}{key}.") if is_section else _coerce(kind, value, f"{prefix}{key}")
    return cls(**values)


def _coerce(kind: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _coerce(next(a for a in args if a is not type(None)), value, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"`{key}` must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin is list and isinstance(value, list):
        return [_coerce(args[0], item, key) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(k): _coerce(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    expected = origin or kind
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ConfigError(f"`{key}` must be {_name(expected)}, not {value!r}")
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"`{key}` must be a number, not {value!r}")
    return value


def _name(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
    return names.get(kind, "a mapping")
