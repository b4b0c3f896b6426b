"""Checkpoint folders: local ones as they are, others from the Hugging Face Hub."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from rgrl.errors import ConfigError

_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def fetch_checkpoint(path: str, what: str) -> Path:
    """A local checkpoint folder, or a Hub id downloaded (weights in safetensors only). `what` names it in errors.

    Raises `ConfigError` if `path` is neither.
    """
    folder = Path(path)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{what} {path} has no config.json; expected a checkpoint folder")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"{what} {path}: no such folder")
    try:
        return Path(snapshot_download(path, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"{what} {path}: neither a folder nor found on the Hub ({type(error).__name__})") from error


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold a checkpoint's weights, sorted: those of its index, or else all.

    Raises `ConfigError` for an index that cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(read_json(index)["weight_map"].values()))
    return sorted(path.name for path in folder.glob("*.safetensors"))


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises `ConfigError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value
