"""Rows of a data set, read by number from where they lie: none is kept in memory, so a million of them start fast.

A row that cannot be read, or is none, is a `Bad` that says why.
"""

import json
import os
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rgrl.errors import ConfigError

MOST_LEVELS = 100  # of lists and mappings in each other; copying and writing rows goes as deep
IN_MEMORY = 1 << 26  # bytes of a file of lines that is kept whole, so that nobody can change it any more
_ENDS = re.compile(rb"\r\n|\r|\n")
_decode = json.JSONDecoder().decode
_skim = json.JSONDecoder(
    parse_int=str, parse_float=str
).raw_decode  # finds where a value ends, however long its numbers
_SPACE = re.compile(r"[ \t\r\n]*")
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Bad:
    """Why there is no row."""

    why: str


Row = dict[str, Any]


class Rows(Protocol):
    """N rows by number. `commit`: that of the Hub, where they are from there."""

    @property
    def commit(self) -> str | None: ...

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> list[Row | Bad]:
        """The rows with these numbers."""

    def told(self, number: int, why: str) -> str:
        """What is wrong with a row, and where it stands: "row 2 is not JSON (line 3)"."""


def fault(row: Any) -> Row | Bad:
    """The row itself where it is a mapping that can be copied, written and compared; else what is wrong."""
    if not isinstance(row, dict):
        return Bad("is not a JSON object")
    for value in row.values():
        if isinstance(value, (list, dict)) and _deeper(value, MOST_LEVELS):
            return Bad(f"is nested more than {MOST_LEVELS} levels deep")
    return row


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, list | dict):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(isinstance(one, list | dict) and _deeper(one, levels - 1) for one in inner)


class ListRows:
    """Rows in memory."""

    commit = None

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: Sequence[int]) -> list[Row | Bad]:
        """The rows with these numbers."""
        return [self.rows[i] for i in numbers]

    def told(self, number: int, why: str) -> str:
        """What is wrong with a row, and where it stands."""
        return f"row {number} {why}"


class LineRows:
    """The lines of a .jsonl or .txt file that are not blank, or the values of a .json; only their places are kept.

    A small file is kept whole. Of a large one each row has a checksum: `read` raises `ConfigError` where the file was
    changed. So does the constructor for a file that cannot be read.
    """

    commit = None

    def __init__(self, path: str, most: int | None = None) -> None:
        self.path, self.plain = path, path.endswith(".txt")
        self.start, self.size = array("q"), array("q")  # bytes
        self.checksum, self.line = array("I"), array("q")
        try:
            self.file: BinaryIO = Path(path).open("rb")
            for number, start, line in _values(self.file, path) if path.endswith(".json") else _lines(self.file):
                if not (line > b"!" and line.isascii()) and not line.decode(errors="replace").strip():
                    continue
                if most is not None and len(self.start) == most:
                    break
                self.start.append(start)
                self.size.append(len(line))
                self.checksum.append(zlib.crc32(line))
                self.line.append(number)
            end = self.start[-1] + self.size[-1] if self.start else 0
            self.content = os.pread(self.file.fileno(), end, 0) if end <= IN_MEMORY else None
        except OSError as error:
            raise ConfigError(f"data file {path} cannot be read: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self.start)

    def told(self, number: int, why: str) -> str:
        """What is wrong with a row, and where it stands."""
        return f"row {number} {why} (line {self.line[number]})"

    def read(self, numbers: Sequence[int]) -> list[Row | Bad]:
        """The rows with these numbers."""
        content = self.content
        if content is not None:
            return [self._row(content[self.start[i] : self.start[i] + self.size[i]]) for i in numbers]
        return [self._row(self._line(i)) for i in numbers]

    def _line(self, i: int) -> bytes:
        start, size = self.start[i], self.size[i]
        try:
            line = os.pread(self.file.fileno(), size, start)
        except OSError as error:
            raise ConfigError(f"data file {self.path} cannot be read any more: {error.strerror}") from error
        if zlib.crc32(line) != self.checksum[i]:
            raise ConfigError(
                f"data file {self.path} was changed while it was in use: {self.told(i, 'is another now')}; put it "
                "back, or start anew",
                on_one_rank=True,
            )
        return line

    def _row(self, line: bytes) -> Row | Bad:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            return Bad(f"is not UTF-8 text (byte {error.start} of the line)")
        if self.plain:
            return {"prompt": text}
        try:
            row = _decode(text)
        except (ValueError, RecursionError):  # the second where it is nested too deeply
            return Bad("is not JSON")
        if b"\\u" in line and _HALF_PAIR.search(line) and isinstance(row, dict):
            with suppress(RecursionError):  # the next check says so
                if not _is_text(json.dumps(row, ensure_ascii=False)):
                    return Bad("holds half a surrogate pair, which is no text")
        return fault(row)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, first byte, content) of each line, whichever of the three kinds of line ends there are."""
    number, at = 0, 0
    for raw in file:
        skip = 3 if at == 0 and raw.startswith(b"\xef\xbb\xbf") else 0  # a byte order mark is no text
        whole, raw = len(raw), raw[skip:]
        if b"\r" not in raw:
            number += 1
            yield number, at + skip, raw.removesuffix(b"\n")
        else:
            begin = 0
            for end in _ENDS.finditer(raw):
                number += 1
                yield number, at + skip + begin, raw[begin : end.start()]
                begin = end.end()
            if begin < len(raw):
                number += 1
                yield number, at + skip + begin, raw[begin:]
        at += whole


def _values(file: BinaryIO, path: str) -> Iterator[tuple[int, int, bytes]]:
    """(number of its line, first byte, content) of each value of a list in JSON, or of values one after another.

    Each is decoded where it is read, so numbers and texts stay what they are. Raises `ConfigError` where it is no JSON.
    """
    try:
        text = file.read().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"data file {path} cannot be read as json: it is not UTF-8 (byte {error.start})") from error
    at, line, byte, counted = _space(text, text.startswith("\ufeff")), 1, 0, 0
    listed = text.startswith("[", at)
    at = _space(text, at + listed)
    while at < len(text) and not (listed and text[at] == "]"):
        try:
            end = _skim(text, at)[1]
        except RecursionError as error:
            raise ConfigError(f"data file {path} cannot be read as json: it is nested too deeply") from error
        except ValueError as error:
            raise ConfigError(f"data file {path} cannot be read as json: {error}") from error
        line, byte, counted = line + text.count("\n", counted, at), byte + len(text[counted:at].encode()), at
        yield line, byte, text[at:end].encode()
        at = _space(text, end)
        if listed and text.startswith(",", at):
            at = _space(text, at + 1)
        elif listed and not text.startswith("]", at):
            break
    if listed and not text.startswith("]", at):
        raise ConfigError(
            f"data file {path} cannot be read as json: no comma, and no end of the list, after line {line}"
        )
    if listed and _space(text, at + 1) < len(text):
        raise ConfigError(f"data file {path} cannot be read as json: something follows its list")


def _space(text: str, at: int) -> int:
    """The place after any white space."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


class TableRows:
    """Rows of a `datasets.Dataset`, which are memory-mapped Arrow."""

    def __init__(self, table: Any, commit: str | None = None) -> None:
        self.table, self.commit = table, commit

    def __len__(self) -> int:
        return len(self.table)

    def told(self, number: int, why: str) -> str:
        """What is wrong with a row, and where it stands."""
        return f"row {number} {why}"

    def read(self, numbers: Sequence[int]) -> list[Row | Bad]:
        """The rows with these numbers."""
        numbers = list(numbers)
        try:
            columns = self.table[numbers]
        except Exception:  # what a value may raise depends on its type: then by row, which tells which it is
            return [self._row(i) for i in numbers]
        if not columns:
            return [{} for _ in numbers]
        return [fault(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def _row(self, number: int) -> Row | Bad:
        try:
            return fault(self.table[number])
        except Exception as error:
            return Bad(f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:120]})")
