"""Tables of completions as parquet files."""

from pathlib import Path
from typing import Any


class Tables:
    """The files `completions/NAME_STEP.parquet`. A table that cannot be written is lost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "completions"
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, name: str, rows: list[dict[str, Any]]) -> str | None:
        """Save one table, whole or not at all. Returns why it could not be written, None if it was."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / f"{name}_{step:06d}.parquet"
        partial = path.with_suffix(".partial")
        try:
            pq.write_table(pa.Table.from_pylist(rows), partial)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            return f"cannot write {path}: {error}"
        return None
