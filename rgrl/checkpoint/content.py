"""Read what a checkpoint says, and refuse what it cannot mean, though its hashes match.

Everything here raises `ConfigError`, in one line that names the file. Nothing of size is read: it is the same for all
checkpoints, and happens before models are loaded.
"""

import json
import math
import pickle
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from rgrl.checkpoint.format import FORMAT, Progress, step_of, versions
from rgrl.config.kinds import SECTIONS
from rgrl.errors import ConfigError
from rgrl.folder import is_id
from rgrl.models.adapter import read_config
from rgrl.models.weights import read_header
from rgrl.seeds import try_state

_UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, RuntimeError, TypeError, ValueError, LookupError)
_UNREADABLE += (AttributeError, OverflowError, RecursionError, pickle.UnpicklingError, yaml.YAMLError)
_UNREADABLE += (zipfile.BadZipFile,)
Rules = dict[str, Callable[[Any], bool]]


def read_file(path: Path, read: Callable[[Path], Any]) -> Any:
    """`read(path)`, with every way in which a file can be unreadable turned into `ConfigError`."""
    try:
        return read(path)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"cannot resume: {path} is missing or damaged ({type(error).__name__})") from error


def check_content(folder: Path) -> None:
    """Refuse a checkpoint whose files are whole and do not say what a checkpoint has to say. Raises `ConfigError`."""
    about(folder)
    settings_of(folder)
    progress_of(folder)
    what = f"cannot resume {folder}: its adapter"
    read_config(folder / "adapter" / "adapter_config.json", what)
    adapter = read_header(folder / "adapter" / "adapter_model.safetensors", what)
    optimizer = state_of(folder)["optimizer"]
    weights = sum(math.prod(tensor.shape) for tensor in adapter.values())
    expected = {"step": len(adapter), "exp_avg": weights, "exp_avg_sq": weights}
    for name, count in expected.items():
        if name in optimizer and optimizer[name].shape != (count,):
            raise ConfigError(f"cannot resume: {folder / 'state.pt'}: the optimizer's `{name}` is not of this adapter")


def about(folder: Path) -> dict[str, Any]:
    """What `about.json` says of how a checkpoint was made. Raises `ConfigError`, also for a newer format."""
    path = folder / "about.json"
    found = read_file(path, _json)
    if isinstance(found, dict) and _whole(found.get("format", 0), 0) and found.get("format", 0) > FORMAT:
        raise ConfigError(
            f"cannot resume {folder}: it has format {found['format']}, of a newer rgrl; this one reads up to {FORMAT}"
        )
    rules: Rules = {
        "format": lambda value: _whole(value, 0),
        "run": is_id,
        "processes": lambda value: _whole(value, 1),
        "versions": lambda value: _texts(value) and value.keys() >= versions().keys(),
        "prompts": lambda value: isinstance(value, str),
        "rows": lambda value: isinstance(value, str),
        "commit": lambda value: value is None or isinstance(value, str),
        "eval": _texts,
        "start": lambda value: _texts(value) and value.keys() >= {"path", "adapter"},
        "model": lambda value: _texts(value) and "family" in value,
        **dict.fromkeys(("reward", "guide", "judge"), _texts),
    }
    _follow(path, found, rules, ("processes", "versions", "prompts"))
    return found


@lru_cache(maxsize=4)
def _yaml(text: str) -> Any:
    """Parsing settings takes a tenth of a second, and each of the checks on resuming asks for them."""
    return yaml.safe_load(text)


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a checkpoint, by section; those that this version does not know too. Raises `ConfigError`."""
    path = folder / "config.yaml"
    found = read_file(path, lambda path: deepcopy(_yaml(path.read_text(encoding="utf-8"))))
    rules: Rules = {name: lambda value: isinstance(value, dict) and all(map(_text, value)) for name in SECTIONS}
    _follow(path, found, rules, ("model", "lora", "data", "reward", "rollout", "guidance", "run"))
    for name in SECTIONS.keys() & found.keys():
        known = {field.name for field in fields(SECTIONS[name])}
        try:
            SECTIONS[name](**{key: value for key, value in found[name].items() if key in known})
        except ConfigError as error:
            raise ConfigError(f"cannot resume: {path}: {error}") from error
    for key in ("output_dir", "prompts_per_device", "steps"):
        _follow(path, found["run"], {}, (key,))
    return found


def progress_of(folder: Path) -> Progress:
    """How far a checkpoint is, which its name says too. Raises `ConfigError`."""
    path = folder / "progress.json"
    found = read_file(path, _json)
    rules: Rules = {name: lambda value: _whole(value, 0) for name in asdict(Progress())}
    rules["evaluations"] = lambda value: isinstance(value, dict)
    _follow(path, found, rules, ("step", "num_tokens"))
    if unknown := sorted(found.keys() - rules.keys()):
        raise ConfigError(f"cannot resume: {path} says `{unknown[0]}`, which nothing here has a use for")
    if step_of(folder) not in (-1, found["step"]):
        raise ConfigError(f"cannot resume {folder}: by its progress.json it is of step {found['step']}")
    return Progress(**found)


def state_of(folder: Path) -> dict[str, Any]:
    """The optimizer's state and the ranks' random states, mapped from the file. Raises `ConfigError`."""
    path = folder / "state.pt"
    state = read_file(path, lambda path: torch.load(path, weights_only=True, map_location="cpu", mmap=True))
    numbers = {"step": torch.Tensor, "exp_avg": torch.Tensor, "exp_avg_sq": torch.Tensor, "param_groups": list}
    rules: Rules = {
        "optimizer": lambda value: (
            _kinds(value, numbers) and len(value) in (1, len(numbers)) and "param_groups" in value
        ),
        "rng": lambda value: isinstance(value, list) and bool(value),
    }
    _follow(path, state, rules, tuple(rules))
    read_file(path, lambda _: list(map(try_state, state["rng"])))
    return state


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _follow(path: Path, found: Any, rules: Rules, needed: tuple[str, ...]) -> None:
    """Refuse a mapping that lacks what is needed, or has a value that breaks its rule."""
    if not isinstance(found, dict):
        raise ConfigError(f"cannot resume: {path} holds no mapping")
    for name in needed:
        if name not in found:
            raise ConfigError(f"cannot resume: {path} does not say `{name}`")
    for name, holds in rules.items():
        if name in found and not holds(found[name]):
            raise ConfigError(f"cannot resume: {path}: `{name}` is not what it has to be")


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(text is None or isinstance(text, str) for text in value.values())


def _kinds(value: Any, kinds: dict[str, type]) -> bool:
    """Whether it is a mapping of such names to values of such types, and to nothing else."""
    return isinstance(value, dict) and all(isinstance(one, kinds.get(name, ())) for name, one in value.items())
