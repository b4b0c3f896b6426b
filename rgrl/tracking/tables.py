"""Tables of completions as parquet files."""

import re
from pathlib import Path
from typing import Any

from rgrl.folder import Owner, not_ours
from rgrl.tracking.columns import as_text

MARK = b"rgrl_run"  # in a table's metadata: the run's id


class Tables:
    """The files `completions/NAME_STEP.parquet`. A table that cannot be written is lost."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        self.folder, self.owner = folder / "completions", owner
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, name: str, rows: list[dict[str, Any]]) -> str | None:
        """Save one table, of `uniform` rows, whole or not at all. Returns why it could not be written, else None."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / f"{name}_{step:06d}.parquet"
        partial = self.owner.partial(path)
        try:
            if not owns_table(path, self.owner):
                raise not_ours(path)
            table = pa.table({name: _array([row[name] for row in rows]) for name in rows[0]})
            pq.write_table(table.replace_schema_metadata({MARK: self.owner.id.encode()}), partial)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            return f"cannot write {path}: {error}"
        return None


def _array(values: list[Any]) -> Any:
    """A column of a table; as text where Parquet has no type for its values, such as lists of several kinds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        array = pa.array(values)
        if pa.types.is_nested(array.type):  # of nested types Parquet lacks some, such as a mapping of nothing
            pq.write_table(pa.table({"column": array}), pa.BufferOutputStream())
        return array
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([None if value is None else as_text(value) for value in values])


def tables_after(output: Path, step: int) -> list[Path]:
    """The tables in a run's folder that it will write again when it goes on after `step`."""
    named = ((re.fullmatch(r"\w+_([0-9]{6,10})\.parquet", path.name), path) for path in output.glob("completions/*"))
    return sorted(path for match, path in named if match and (int(match[1]) > step or step == 0))


def owns_table(path: Path, owner: Owner) -> bool:
    """Whether a table is the run's, or nothing yet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists() and not path.is_symlink():
        return True
    try:
        mark = (pq.read_schema(path).metadata or {}).get(MARK)
    except (OSError, pa.ArrowException):
        return False
    return owner.owns(mark.decode(errors="replace") if mark is not None else None)
