"""Checkpoint folders: local ones as they are, others from the Hugging Face Hub."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from rgrl.errors import ConfigError

_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
_MORE = ["*.py", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"]  # never run, only copied


def fetch_checkpoint(
    path: str, what: str, revision: str | None = None, code: bool = False, weights: bool = True
) -> Path:
    """A local checkpoint folder, or a Hub id downloaded (weights in safetensors only). `what` names it in errors.

    `revision` is a branch, tag or commit of the Hub (None: its main branch). With `code` the authors' code and terms
    come along, to be copied: nothing here runs it; without `weights` they stay there. Raises `ConfigError` if `path` is
    neither, and for a revision of a local folder.
    """
    folder = Path(path)
    if folder.exists():
        if revision is not None:
            raise ConfigError(
                f"{what} {path} is a folder, and only a checkpoint of the Hub has a revision ({revision}): set the "
                "revision to null"
            )
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{what} {path} has no config.json; expected a checkpoint folder")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"{what} {path}: no such folder")
    try:
        wanted = [name for name in _FILES if weights or name != "*.safetensors"] + _MORE * code
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        pinned = "" if revision is None else f" at revision {revision}"
        raise ConfigError(
            f"{what} {path}: neither a folder nor found on the Hub{pinned} ({type(error).__name__})"
        ) from error


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot of the Hub, as its cache lays it out; None for any other folder."""
    resolved = folder.resolve()
    snapshot = resolved.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", resolved.name)
    return resolved.name if snapshot else None


def resolved_revision(path: str, revision: str | None, commit: str | None) -> str | None:
    """What pins the checkpoint that was loaded from `path`: its `commit`, if it came from the Hub."""
    return commit or revision if not Path(path).exists() else None


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold a checkpoint's weights, sorted; empty where there are none.

    `model.safetensors` alone where it is there, or else the files of `model.safetensors.index.json`, as transformers
    chooses. Other files are never read. Raises `ConfigError` for an index that is none or that leads out of the folder,
    and for an adapter in the folder, which transformers would load in place of the weights.
    """
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} holds an adapter (adapter_config.json) beside a model: move it to a folder of its own, or name "
            "the folder of the base model and the adapter separately"
        )
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    return sorted(set(read_index(index).values())) if index.is_file() else []


def read_index(path: Path) -> dict[str, str]:
    """The file that holds each tensor, by the tensor's name. Raises `ConfigError`."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ConfigError(f"{path} has no `weight_map` from tensors to files")
    for name in places.values():
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ConfigError(f"{path} names {name!r}, which is not a safetensors file in that folder")
    return places


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises `ConfigError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except ConfigError as error:
        raise ConfigError(f"{path} {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which a second value of a key would silently win."""
    keys = [key for key, _ in pairs]
    if twice := sorted(key for key in set(keys) if keys.count(key) > 1):
        raise ConfigError(f"says `{twice[0]}` twice")
    return dict(pairs)
