"""Columns of completions' tables: what belongs to a completion, the parts of its reward, and the data's own columns.

A table is for people, and for programs that read Parquet, JSON lines or W&B: so every value is a text, a number, true
or false, or nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a report needs no torch
    from torch import Tensor

LONGEST = 10_000  # characters that a table holds of a value of the data
OURS = tuple("index sample prompt chat completion guided reward advantage judge length top_word".split())


def parts_of(terms: Mapping[str, "Tensor"]) -> list[dict[str, float | None]]:
    """The parts of the reward of each of B completions, by column `rewards/<name>`; None where a part gives none (NaN).

    `terms` are the parts by name, each r_B.
    """
    columns = {f"rewards/{name}": or_none(r_B) for name, r_B in terms.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def or_none(reward_B: "Tensor") -> list[float | None]:
    """Rewards as numbers, None where there is no reward (NaN)."""
    return [None if math.isnan(r) else r for r in reward_B.tolist()]


def data_columns(row: Mapping[str, Any], prompt: str, text: str) -> dict[str, Any]:
    """The columns of a data row as a table has them, without the column `prompt` where it is the prompt's `text`.

    A column with the name of one of a table's own (`OURS`, and what has a slash) is called `data/<name>`.
    """
    found = {}
    for name, value in row.items():
        column = str(plain(name))
        if column in OURS or "/" in column:
            column = f"data/{column}"
        if not (name == prompt and isinstance(value, str) and value == text):
            found[column] = plain(value)
    return found


def plain(value: Any) -> str | int | float | bool | None:
    """A value as a table holds it: what is no text or number as JSON, if it can be, and cut where it is long.

    NaN, which stands for what is missing, is None; an infinite number is text.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and type(value) is int:
        return value if -(2**63) <= value < 2**63 else _cut(_number(value))
    if type(value) is float:
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, str):
        return _cut(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of NumPy's or torch's
        return plain(value.item())
    return as_text(value)


def _number(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # of more digits than Python prints
        return hex(value)


def as_text(value: Any) -> str:
    """Text as it is, other values as JSON where they can be; cut where that is long."""
    if not isinstance(value, bool | int | float | list | tuple | dict | None):
        value = value if isinstance(value, str) else _within(value)
        if isinstance(value, str):
            return _cut(value)
    try:
        return _cut(json.dumps(value, ensure_ascii=False, default=_within))
    except (ValueError, TypeError, RecursionError):  # a list in itself, keys of another kind, nested too deeply
        return f"<{type(value).__name__}>"


def _within(value: Any) -> Any:
    """What stands in JSON for a value that it lacks."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value):,} bytes>"
    if hasattr(value, "tolist"):  # an array
        return value.tolist()
    told = isinstance(value, Number) or hasattr(value, "isoformat")  # decimals, dates
    return str(value) if told else f"<{type(value).__name__}>"


def _cut(text: str) -> str:
    """Text that any file can hold, its end replaced by its length where it is too long."""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text):,} characters)"
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text


def uniform(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that all have the same columns, in the order in which they are first named, each of one kind of value.

    What a row lacks is None. Where a column holds several kinds, as a file and W&B cannot, all of it becomes text.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _alike([row.get(name) for row in rows]) for name in names}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _alike(values: list[Any]) -> list[Any]:
    """Whole and other numbers are of one kind, as far as no digit is lost."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1:
        return values
    if kinds == {int, float} and all(abs(value) <= 2**53 for value in values if isinstance(value, int)):
        return [None if value is None else float(value) for value in values]
    return [None if value is None else as_text(value) for value in values]
