"""Read prompts from files, saved data sets and the Hub. Reading only: the order of prompts is `stream.py`'s."""

import glob
import json
import os
import re
import tempfile
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
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict)]
        value = next((turn.get("content") for turn in turns if turn.get("role") == "user"), None)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{path}: row {i} has no prompt text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{path}: row {i} has a prompt with half a surrogate pair (character {error.start}), which is no text"
        ) from error
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
    except OSError as error:
        raise ConfigError(f"data file {path} cannot be read: {error.strerror}") from error
    if file.suffix == ".txt":
        return [{"prompt": line} for line in lines if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the second where it is nested too deeply
            raise ConfigError(f"{path}: line {number} is not JSON") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: line {number} is not a JSON object")
        rows.append(row)
    return rows


def _read_data_set(path: str, split: str) -> list[dict[str, Any]]:
    """Rows of a file, folder or Hub id that the `datasets` library reads.

    What it raises has no common class: it depends on the format, and on what reads that.
    """
    import datasets  # only for what the standard library does not read

    file = Path(path)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would print a cause that our error names
    if file.is_file():
        kind = file.suffix.removeprefix(".")
        if kind not in ("json", "csv", "parquet"):
            raise ConfigError(f"data file {path}: expected .jsonl, .json, .csv, .parquet or .txt")
        try:
            if kind == "json" and (odd := _broken_text(file.read_bytes())) is not None:
                raise ConfigError(f"{path}: row {odd} holds half a surrogate pair, which is no text")
            return _read_file(file, kind) if file.stat().st_size else []
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"data file {path} cannot be read as {kind}: {_reason(error)}") from error
    if file.is_dir():
        try:
            saved = datasets.load_from_disk(os.path.abspath(path))
            found = saved if isinstance(saved, datasets.DatasetDict) else {split: saved}
            rows = list(found[split]) if split in found else None
        except Exception as error:
            raise ConfigError(f"data folder {path} cannot be read as a saved data set: {_reason(error)}") from error
        if rows is None:
            raise ConfigError(f"data folder {path} has no split {split!r}; it has {', '.join(found)}")
        return rows
    if path.startswith((".", "/")) or path.count("/") > 1:
        raise ConfigError(f"data {path}: no such file or folder")
    try:
        return list(datasets.load_dataset(path, split=split))
    except Exception as error:
        raise ConfigError(f"data {path}: neither a file nor found on the Hub ({type(error).__name__})") from error


def _read_file(file: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of a .json, .csv or .parquet file, whatever its name and those of its folders are.

    `datasets` takes a name for a pattern, and might read other files; then it is shown the file under a plain name.
    """
    import datasets

    path = str(file.absolute())
    if not (glob.has_magic(path) or ":" in path):
        return list(datasets.load_dataset(kind, data_files=path, split="train"))
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, f"data.{kind}")
        plain.symlink_to(path)
        return list(datasets.load_dataset(kind, data_files=str(plain), split="train", cache_dir=f"{folder}/cache"))


def _broken_text(content: bytes) -> int | None:
    """The first row of a JSON file that holds half a surrogate pair, which `datasets` drops in silence, or None."""
    if not re.search(rb"\\u[dD][89a-fA-F]", content):
        return None
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError):
        rows = [_loaded(line) for line in content.splitlines()]
    rows = rows if isinstance(rows, list) else [rows]
    texts = (json.dumps(row, ensure_ascii=False) for row in rows)
    return next((i for i, text in enumerate(texts) if text != text.encode(errors="ignore").decode()), None)


def _loaded(line: bytes) -> Any:
    """A line of JSON; None for one that is none, which the reader of the whole file will name."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _reason(error: Exception) -> str:
    """What a library says is wrong, in a few words: of the cause, where the error only says that there was one."""
    told = error.__cause__ or error
    return " ".join(str(told).split())[:300] or type(told).__name__
