"""Whose a run's folder is. Only what a run wrote itself is ever replaced or deleted.

A run has an id, in the file `rgrl_run.json` of its folder and in everything that it may replace later: checkpoints
(about.json and manifest.json), tables (their metadata), plots, config.yaml (its first line) and the names of files that
are not finished yet. A file of such a name without the id is somebody else's, and is left alone.
"""

import json
import os
import re
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from rgrl.errors import ConfigError

RUN_FILE = "rgrl_run.json"
# What a run writes at the top of its folder, beside `wandb/`, in which W&B gives names of its own.
NAMES = "config.yaml metrics.jsonl completions checkpoints skipped reward.png requeue wandb_id.txt".split()
_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Owner:
    """The run that a folder belongs to. `older`: versions that left no mark on what they wrote began it."""

    id: str
    older: bool = False

    def owns(self, mark: str | None) -> bool:
        """Whether something is this run's that carries the id `mark`, or none."""
        return mark == self.id or (mark is None and self.older)

    def partial(self, path: Path) -> Path:
        """Where a file is written before it has its name. The id in it says whose it is, after a kill too."""
        return path.with_name(f".{path.name}.{self.id}")


def is_id(value: object) -> bool:
    """Whether a value is the id of a run."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def new_owner() -> Owner:
    """A run that nobody has had before."""
    return Owner(uuid.uuid4().hex)


def owner_of(output: Path) -> Owner | None:
    """The run that the folder is of; None where it is of none, or of an older version's. Raises `ConfigError`."""
    path = output / RUN_FILE
    try:
        found = json.loads(path.read_bytes())
        if not is_id(found["id"]) or not isinstance(found["older"], bool):
            raise ValueError("no id")
        return Owner(found["id"], found["older"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} does not say which run this folder is of ({type(error).__name__}): restore it, or choose another "
            "`run.output_dir`"
        ) from error


def claim(output: Path, owner: Owner) -> None:
    """Say in the folder that it is `owner`'s. Raises `OSError`."""
    if owner_of(output) != owner:
        replace(output / RUN_FILE, json.dumps(asdict(owner)).encode() + b"\n", owner)


def in_the_way(output: Path) -> str | None:
    """A file that a new run would write, and that is there already; None if there is none."""
    for name in NAMES:
        path = output / name
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            return name
    return None


def replace(path: Path, content: bytes | memoryview, owner: Owner) -> None:
    """Write a file whole or not at all, and flush it to disk. Raises `OSError`."""
    partial = owner.partial(path)
    try:
        with partial.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def not_ours(path: Path) -> FileExistsError:
    """The error for a file that would have to be replaced, and that the run did not write."""
    return FileExistsError(f"{path} is there already, and this run did not write it: move it away")
