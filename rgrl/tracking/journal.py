"""The journal of a run: `metrics.jsonl`, one line of JSON per step, flushed to disk before the next checkpoint."""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """The lines of metrics.jsonl. Lines that cannot be written wait in memory until they can be.

    `start_step` is the step resumed from: later lines, left by a run that was killed, are dropped. Raises `OSError` if
    the file cannot be made.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.failure: str | None = None  # why lines wait; None if none does
        self._waiting: list[str] = []
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step] if start_step else []
        partial = self.path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(line) + "\n" for line in kept))
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(self.path)

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
    """The lines of a metrics file. A last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
