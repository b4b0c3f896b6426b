"""The journal of a run: `metrics.jsonl`, one line of JSON per step, flushed to disk before the next checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

from rgrl.console import warn
from rgrl.folder import Owner, replace


class Journal:
    """The lines of metrics.jsonl. Lines that cannot be written wait in memory until they can be.

    `start_step` is the step resumed from: later lines, left by a run that was killed, are dropped; damaged ones before
    them stay as they are, with a warning. Raises `OSError` if the file cannot be made.
    """

    def __init__(self, folder: Path, start_step: int, owner: Owner) -> None:
        self.path = folder / "metrics.jsonl"
        self.failure: str | None = None  # why lines wait; None if none does
        self._waiting: list[str] = []
        kept: list[bytes] = []
        if start_step:
            if not self.path.exists():
                warn(f"{self.path} is missing: the metrics up to step {start_step} are lost")
            elif (problem := damaged_lines(self.path)) is not None:
                warn(problem)
            kept = _up_to(self.path, start_step)
        replace(self.path, b"".join(line + b"\n" for line in kept), owner)

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Append one line and try to flush it to disk."""
        self._waiting.append(json.dumps({"step": step, **metrics}) + "\n")
        self.flush()

    def flush(self) -> bool:
        """Write the lines that wait, all or none of them; True if no line waits any more."""
        if not self._waiting:
            return True
        try:
            with self.path.open("ab", buffering=0) as handle:
                end = handle.seek(0, os.SEEK_END)
                text = "".join(self._waiting).encode()
                try:
                    while text:  # a nearly full disk may accept only part of it
                        text = text[handle.write(text) :]
                    os.fsync(handle.fileno())
                except OSError:
                    handle.truncate(end)
                    raise
            self._waiting = []
            self.failure = None
        except OSError as error:
            self.failure = f"cannot write {self.path}: {error}"
        return not self._waiting


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none where there is no file. Lines that cannot be read are left out."""
    return [line for _, line in _lines(path) if line is not None]


def damaged_lines(path: Path) -> str | None:
    """Which lines of a metrics file cannot be read, in words; None if all can be.

    A last line without its end does not count: the run is writing it, or was killed there.
    """
    lines = _lines(path)
    whole = lines if not lines or path.read_bytes().endswith(b"\n") else lines[:-1]
    numbers = [str(number) for number, (_, line) in enumerate(whole, 1) if line is None]
    if not numbers:
        return None
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"{path}: {'line' if len(numbers) == 1 else 'lines'} {', '.join(numbers[:5])}{more} cannot be read: left out"


def _up_to(path: Path, step: int) -> list[bytes]:
    """The lines as they are up to the last one of `step` or before, without those of later steps among them."""
    lines = [(text, line) for text, line in _lines(path) if line is None or line["step"] <= step]
    while lines and lines[-1][1] is None:
        lines.pop()
    return [text for text, _ in lines]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a metrics file, and what it says; None where that is not a step and its numbers."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [(text, _numbers(text)) for text in content.removesuffix(b"\n").split(b"\n")] if content else []


def _numbers(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
        return None
    plain = all(value is None or (isinstance(value, int | float) and value == value) for value in line.values())
    return line if plain else None
