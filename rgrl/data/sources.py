"""Open the rows of files, folders and data sets of the Hub. Reading only: what is made of them is in `prompts.py`."""

import csv
import glob
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from rgrl.data.rows import LineRows, ListRows, Rows, TableRows
from rgrl.errors import ConfigError

_LINES, _FILES = (".txt", ".jsonl", ".json"), ("csv", "parquet")
_COMMIT = re.compile("[0-9a-f]{40}")
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # what `save_to_disk` leaves


@dataclass(frozen=True)
class Source:
    """Where rows are, as the settings say. `eval_` begins the settings' names where they are those of evaluation."""

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    eval_: str = ""
    most: int | None = None  # rows that are read at most; None: all
    chosen: bool = False  # whether the settings name the split, and mean it

    def __str__(self) -> str:
        return self.path


def open_rows(source: Source) -> Rows:
    """The rows of a file, a folder or a data set of the Hub. Raises `ConfigError`."""
    path, file = source.path, Path(source.path)
    if file.suffix in _LINES or file.is_file():
        if source.revision is not None:
            raise ConfigError(
                f"data {path} is a file, and only a data set of the Hub has a revision ({source.revision}): set the "
                "revision to null"
            )
        if source.subset is not None:
            raise ConfigError(f"data {path} is a file, which has no subset ({source.subset}): set it to null")
        if source.chosen:
            raise ConfigError(_no_splits(source, "is a file, which has no splits"))
    if file.suffix in _LINES:
        if not file.is_file():
            raise ConfigError(f"data file {path}: no such file")
        return LineRows(path, source.most)
    if file.suffix.removeprefix(".") in _FILES and not file.is_file():
        raise ConfigError(f"data file {path}: no such file")
    table, commit = _read_data_set(source)
    if isinstance(table, list):
        return ListRows(table)
    # A saved data set may say that its columns are to be given as arrays, or only some of them.
    table = table.with_format(None)
    first = table if source.most is None or source.most >= len(table) else table.select(range(source.most))
    return TableRows(first, commit)


def _no_splits(source: Source, why: str) -> str:
    """The message where a split is named of what has none: the same rows would be trained and evaluated on."""
    remedy = "set it to null; `data.eval_fraction` holds rows out" if source.eval_ else "leave it out"
    return f"data {source.path} {why} (`data.{source.eval_}split` is {source.split!r}): {remedy}"


def _read_data_set(source: Source) -> tuple[Any, str | None]:
    """What the `datasets` library makes of a file, folder or Hub id, [] for an empty file; and its commit of the Hub.

    What it raises has no common class: it depends on the format, and on what reads that.
    """
    import datasets  # only for what the standard library does not read

    path, file = source.path, Path(source.path)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would print a cause that our error names
    if file.is_file():
        kind = file.suffix.removeprefix(".")
        if kind not in _FILES:
            raise ConfigError(f"data file {path}: expected .jsonl, .json, .csv, .parquet or .txt")
        try:
            if kind == "csv" and (ragged := _ragged(file)) is not None:
                raise ConfigError(f"data file {path}: {ragged}")
            return (_read_file(file, kind) if file.stat().st_size else []), None
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"data file {path} cannot be read as {kind}: {_reason(error)}") from error
    if file.is_dir():
        saved = any((file / name).is_file() for name in _SAVED)
        return (_read_saved(source), None) if saved else _read_repository(source, f"data folder {path} cannot be read")
    if path.startswith((".", "/")) or path.count("/") > 1:
        raise ConfigError(f"data {path}: no such file or folder")
    return _read_repository(source, f"data {path}: neither a file nor found on the Hub")


def _read_saved(source: Source) -> Any:
    """A folder of `save_to_disk`."""
    import datasets

    path = source.path
    for name, value in (("revision", source.revision), ("subset", source.subset)):
        if value is not None:
            raise ConfigError(f"data folder {path} is a saved data set, which has no {name} ({value}): set it to null")
    try:
        saved = datasets.load_from_disk(os.path.abspath(path))
    except Exception as error:
        raise ConfigError(f"data folder {path} cannot be read as a saved data set: {_reason(error)}") from error
    if not isinstance(saved, datasets.DatasetDict):
        if source.chosen and str(saved.split) != source.split:
            raise ConfigError(_no_splits(source, "is a folder of a single split"))
        return saved
    if source.split not in saved:
        raise ConfigError(f"data folder {path} has no split {source.split!r}; it has {', '.join(saved)}")
    return saved[source.split]


def _read_repository(source: Source, otherwise: str) -> tuple[Any, str | None]:
    """One split of a data set of the Hub, with its commit, or of a folder laid out like one.

    `otherwise` begins other errors.
    """
    import datasets

    path, subset, split = source.path, source.subset, source.split
    local = Path(path).is_dir()
    if local and source.revision is not None:
        raise ConfigError(
            f"data folder {path}: only a data set of the Hub has a revision ({source.revision}): set it to null"
        )
    where = os.path.abspath(path) if local else path
    try:
        builder = datasets.load_dataset_builder(where, subset, revision=source.revision)
        builder.download_and_prepare()
        table = builder.as_dataset(split=split)
    except Exception as error:
        pinned = "" if source.revision is None else f" at revision {source.revision}"
        problem = _choice(source, error) or f"{otherwise}{pinned}: {_reason(error)} ({type(error).__name__})"
        raise ConfigError(problem) from error
    # A data set of the Hub is kept by its commit.
    commit = str(builder.hash) if not local and _COMMIT.fullmatch(str(builder.hash)) else None
    if source.revision is not None and type(builder).__module__.startswith("datasets.packaged_modules.cache"):
        _check_cached(source, commit)
    return table, commit


def _check_cached(source: Source, commit: str | None) -> None:
    """Refuse another commit than the revision asked for. Raises `ConfigError`.

    Where the Hub cannot be reached, `datasets` takes the newest that it has kept, whatever the revision.
    """
    asked = str(source.revision)
    if not _COMMIT.fullmatch(asked):
        card = try_to_load_from_cache(source.path, "README.md", revision=asked, repo_type="dataset")
        asked = Path(card).parent.name if isinstance(card, str) else ""
    if asked != commit:
        raise ConfigError(
            f"data {source.path}: the Hub cannot be reached for revision {source.revision}, and what is kept here is "
            f"{f'commit {commit}' if commit else 'of no known commit'}"
        )


def _choice(source: Source, error: Exception) -> str | None:
    """What there is to choose from, where an error says that a configuration or a split is missing or is none."""
    told, path, setting = str(error), source.path, f"`data.{source.eval_}subset`"
    names = ", ".join(re.findall(r"'([^']*)'", told.partition("[")[2].partition("]")[0]))
    if told.startswith("Config name is missing"):
        return f"data {path} has several configurations: name one of {names} as {setting}"
    if told.startswith("BuilderConfig"):
        return f"data {path} has no configuration {source.subset!r} ({setting}); it has {names}"
    if told.startswith("Unknown split"):
        return f"data {path} has no split {source.split!r} (`data.{source.eval_}split`); it has {names}"
    return None


def _read_file(file: Path, kind: str) -> Any:
    """The rows of a .csv or .parquet file, whatever its name and those of its folders are.

    `datasets` takes a name for a pattern, and might read other files; then it is shown the file under a plain name.
    """
    import datasets

    path = str(file.absolute())
    # Of a CSV only an empty cell is nothing: NA, null and None are texts.
    own: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    if not (glob.has_magic(path) or ":" in path):
        return datasets.load_dataset(kind, data_files=path, split="train", **own)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, f"data.{kind}")
        plain.symlink_to(path)
        # In memory, as the folder does not stay.
        cache = f"{folder}/cache"
        return datasets.load_dataset(
            kind, data_files=str(plain), split="train", cache_dir=cache, keep_in_memory=True, **own
        )


def _ragged(file: Path) -> str | None:
    """What is wrong where a row of a CSV has more fields than its header, None where none has.

    pandas would take the first fields for names of rows, and read the others one column further left.
    """
    before = csv.field_size_limit(2**31 - 1)
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as lines:
            reader = csv.reader(lines)
            width = 0
            for row in reader:
                width = width or len(row)  # what precedes the header is blank
                if len(row) > width:
                    return (
                        f"line {reader.line_num} has {len(row)} fields, and the header {width}; a text with a "
                        "comma in it stands in quotes"
                    )
    finally:
        csv.field_size_limit(before)
    return None


def _reason(error: Exception) -> str:
    """What a library says is wrong, in a few words: of the cause, where the error only says that there was one."""
    told = error.__cause__ or error
    return " ".join(str(told).split())[:300] or type(told).__name__
