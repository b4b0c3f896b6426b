"""Where numbers go: the journal always, W&B in its own mode, tables of completions to both.

To add a tracker other than W&B, write a class with the methods of `Sink` (`log`, `table`, `close`) and add it in
`make_sinks`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rgrl.config import Config
from rgrl.console import warn
from rgrl.folder import Owner
from rgrl.tracking.columns import uniform
from rgrl.tracking.journal import Journal, read_metrics
from rgrl.tracking.tables import Tables
from rgrl.tracking.wandb import WandbSink

__all__ = ["Sink", "Tracker", "make_sinks", "read_metrics"]


class Sink(Protocol):
    """An additional destination for a run's metrics and tables. If it raises, the run warns and goes on without it."""

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Take one step's metrics; None stands for a number that is not finite."""
        ...

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Take a table of completions, at least one row; all rows have the same columns."""
        ...

    def close(self) -> None:
        """Finish: the run is over."""
        ...


def make_sinks(config: Config) -> dict[str, Callable[[], Sink]]:
    """The optional sinks that the settings ask for: their names in warnings, and how to open each (it may raise)."""
    sinks: dict[str, Callable[[], Sink]] = {}
    if config.tracking.wandb:
        sinks["W&B"] = lambda: WandbSink(config)
    return sinks


class Tracker:
    """The main process's record of a run; on other processes every method does nothing.

    `start_step` is the step resumed from, `owner` the run. The journal and the tables are the run's own: their write
    errors go to `failures`, which the caller clears. An optional sink that raises is dropped; the run goes on.
    """

    def __init__(self, config: Config, owner: Owner, start_step: int, enabled: bool) -> None:
        self.enabled = enabled
        self.failures: dict[str, str] = {}
        self._sinks: dict[str, Sink] = {}
        if not enabled:
            return
        folder = Path(config.run.output_dir)
        self._tables = Tables(folder, owner)
        self._journal = Journal(folder, start_step, owner)
        for name, open_sink in make_sinks(config).items():
            if (sink := self._guard(name, open_sink)) is not None:
                self._sinks[name] = sink

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to the journal; numbers that are not finite are written as null."""
        if not self.enabled:
            return
        clean: dict[str, float | None] = {k: (v if math.isfinite(v) else None) for k, v in metrics.items()}
        self._journal.log(step, clean)
        self._note_lines()
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.log, step, clean)

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Save `completions/NAME_STEP.parquet`, and give the table to the other sinks."""
        if not self.enabled or not rows:
            return
        rows = uniform(rows)
        if (failure := self._tables.write(step, name, rows)) is not None:
            self.failures["table"] = failure
        for sink_name, sink in list(self._sinks.items()):
            self._guard(sink_name, sink.table, step, name, rows)

    def flush(self) -> bool:
        """Write journal lines that could not be written before; True if none is left."""
        if not self.enabled:
            return True
        done = self._journal.flush()
        self._note_lines()
        return done

    def destinations(self) -> str:
        """Where the other sinks send the record. A sink may say so in an attribute `where`."""
        return ", ".join(f"{name} {getattr(sink, 'where', 'on')}" for name, sink in self._sinks.items())

    def close(self) -> None:
        """End the other sinks' runs."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.close)

    def _note_lines(self) -> None:
        """Note why lines wait. Once they are written they are no failure any more."""
        if self._journal.failure is None:
            self.failures.pop("lines", None)
        else:
            self.failures["lines"] = self._journal.failure

    def _guard(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        """`call(*args)` of a sink; if it raises, warn, drop the sink and return None.

        An optional sink must not end a run, and what it may raise has no common base class.
        """
        try:
            return call(*args)
        except Exception as error:
            self._sinks.pop(name, None)
            warn(
                f"{name} failed and is off for the rest of this run, whose own files go on: {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            )
            return None
