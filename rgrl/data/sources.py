"""Read prompts from files, saved data sets and the Hub. Reading only: the order of prompts is `stream.py`'s."""

import json
from pathlib import Path
from typing import Any

from rgrl.config import DataConfig
from rgrl.errors import ConfigError
from rgrl.types import Prompts


def load_prompts(path: str, config: DataConfig) -> Prompts:
    """Read prompts from a file, a saved data set or the Hub. Raises `ConfigError`."""
    rows = _read_rows(path, config.split)
    if not rows:
        raise ConfigError(f"{path} has no rows: expected at least one prompt")
    if config.column not in rows[0]:
        raise ConfigError(f"{path} has no column {config.column!r}; it has {', '.join(rows[0])}")
    return Prompts([_first_turn(row.get(config.column), i, path) for i, row in enumerate(rows)], rows)


def _first_turn(value: Any, i: int, path: str) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = next((turn.get("content") for turn in value if turn.get("role") == "user"), None)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{path}: row {i} has no prompt text")
    return value


def _read_rows(path: str, split: str) -> list[dict[str, Any]]:
    file = Path(path)
    if file.suffix in (".txt", ".jsonl"):
        return _read_lines(path)
    if file.suffix in (".json", ".csv", ".parquet") and not file.is_file():
        raise ConfigError(f"data file {path}: no such file")
    return _read_data_set(path, split)


def _read_lines(path: str) -> list[dict[str, Any]]:
    """Rows of a .txt or .jsonl file."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"data file {path}: no such file")
    try:
        # Not `splitlines`, which also cuts at characters that JSON may hold.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data file {path} is not UTF-8 text (byte {error.start})") from error
    if file.suffix == ".txt":
        return [{"prompt": line} for line in lines if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is not JSON") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: line {number} is not a JSON object")
        rows.append(row)
    return rows


def _read_data_set(path: str, split: str) -> list[dict[str, Any]]:
    """Rows of a file, folder or Hub id that the `datasets` library reads."""
    import datasets  # only for what the standard library does not read

    file = Path(path)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would print a cause that our error names
    if file.is_file():
        kind = file.suffix.removeprefix(".")
        if kind not in ("json", "csv", "parquet"):
            raise ConfigError(f"data file {path}: expected .jsonl, .json, .csv, .parquet or .txt")
        try:
            return list(datasets.load_dataset(kind, data_files=path, split="train"))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(f"data file {path} cannot be read as {kind}: {error.__cause__ or error}") from error
    if file.is_dir():
        try:
            saved = datasets.load_from_disk(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"data folder {path} cannot be read as a saved data set: {error}") from error
        if isinstance(saved, datasets.DatasetDict) and split not in saved:
            raise ConfigError(f"data folder {path} has no split {split!r}; it has {', '.join(saved)}")
        return list(saved[split] if isinstance(saved, datasets.DatasetDict) else saved)
    if path.startswith((".", "/")) or path.count("/") > 1:
        raise ConfigError(f"data {path}: no such file or folder")
    try:
        return list(datasets.load_dataset(path, split=split))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data {path}: neither a file nor found on the Hub ({type(error).__name__})") from error
