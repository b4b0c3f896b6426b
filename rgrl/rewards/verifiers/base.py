"""What a verifier is: settings of its own, how it reads a row of the data, and how it scores a completion by that.

A row that it cannot read gives no reward (None), and is counted; so does a completion whose check was ended at its time
limit. A completion that holds no answer, or none that can be read, gets 0: that is the policy's doing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rgrl.config.explain import explain, short
from rgrl.errors import ConfigError
from rgrl.rewards.verifiers.process import Process
from rgrl.types import SomePrompts

MOST_ROWS_READ = 10_000  # of the data, when a run starts; evenly spaced
LONGEST = 200_000  # characters of a completion that are read: its last ones


class BadRowError(ValueError):
    """What a verifier cannot read of a row of the data."""


@dataclass(frozen=True)
class Job:
    """What a verifier asks of its own process (worker.py): the kind of job and its texts."""

    kind: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Verifier:
    """A kind of verifier.

    `read(row, settings)`: what completions of the row are held against, None where the row has nothing, or
    `BadRowError`. `score(completion, expected, settings)`: a number, None, or a `Job` whose result is the score.
    `columns(settings)`: those that it reads. `seconds`: default time limit of a completion, where it has a process of
    its own; 0: it has none, and takes time that is linear in the text.
    """

    settings: type
    read: Callable[[Mapping[str, Any], Any], Any]
    score: Callable[[str, Any, Any], float | Job | None]
    columns: Callable[[Any], list[str]]
    seconds: float = 0.0
    positive: bool = True  # whether it can be above 0: a penalty cannot
    job: str = ""  # the kind of its jobs, where it has a process


@dataclass
class Verification:
    """A verifier with its settings: a reward function."""

    name: str
    verifier: Verifier
    settings: Any
    seconds: float = 0.0  # of one completion
    process: Process | None = field(default=None, repr=False)

    def __call__(self, prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float | None]:
        """The score of each completion by its row; None for no reward."""
        return [self._score(text[-LONGEST:], row) for text, row in zip(completions, rows, strict=True)]

    def _score(self, text: str, row: dict[str, Any]) -> float | None:
        try:
            expected = self.verifier.read(row, self.settings)
        except BadRowError:
            return None
        if expected is None:
            return None
        found = self.verifier.score(text, expected, self.settings)
        if not isinstance(found, Job):
            return found
        return self._process().ask(found.kind, found.texts, self.seconds)

    def _process(self) -> Process:
        if self.process is None:
            self.process = Process()
        return self.process

    def check(self, prompts: SomePrompts, setting: str, most_bad: float) -> str | None:
        """Read rows of the data, before a run starts. Returns what to warn of.

        Raises `ConfigError` for a column that no row has, where more than the fraction `most_bad` cannot be read, and
        where its own process cannot do what it will be asked for.
        """
        total = len(prompts)
        chosen = list(range(total)) if total <= MOST_ROWS_READ else _spaced(total, MOST_ROWS_READ)
        needed, bad, first = set(self.verifier.columns(self.settings)), 0, ""
        seen: set[str] = set()
        known: set[str] = set()
        for i, row in _rows(prompts, chosen):
            known.update(row)
            seen.update(name for name in needed if row.get(name) is not None)
            try:
                self.verifier.read(row, self.settings)
            except BadRowError as error:
                first = first or f"row {i}: {error}"
                bad += 1
        for name in sorted(needed - seen):
            has = f"; it has {', '.join(sorted(known))}" if name not in known else ", which is empty in all rows"
            raise ConfigError(f"reward {self.name!r} reads the column {name!r} of `{setting}`{has}")
        if self.verifier.job:  # whatever a trial's completions say, they may not get as far as a job
            self._process().prepare(self.verifier.job)
        told = f"reward {self.name!r} cannot read {bad:,} of {len(chosen):,} rows of `{setting}`, the first is {first}"
        if bad > most_bad * len(chosen):
            raise ConfigError(f"{told}; rows that give no reward are accepted up to the fraction `reward.max_bad`")
        return f"{told}; they give no reward" if bad else None


def _spaced(total: int, count: int) -> list[int]:
    return [i * total // count for i in range(count)]


def _rows(prompts: SomePrompts, chosen: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row), a thousand at a time: rows may come from a file."""
    for start in range(0, len(chosen), 1000):
        part = chosen[start : start + 1000]
        yield from zip(part, prompts.take(part).rows, strict=True)


def checked(cls: type, values: Mapping[str, Any], name: str) -> Any:
    """Settings of a verifier as its dataclass. Raises `ConfigError`."""
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(explain(error, name, {name: cls})) from None


def own_settings(cls: type) -> type:
    """A frozen dataclass whose values pydantic checks, and which takes no other keys."""
    made: Any = dataclass(frozen=True)(cls)
    made.__pydantic_config__ = ConfigDict(extra="forbid")
    return made


def as_text(value: Any, column: str) -> str:
    """A right answer as text: a text, a flag or a number; 5.0 is written 5. Raises `BadRowError`."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and value.bit_length() < 10_000:
        return str(value)
    if isinstance(value, float) and value == value:
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    raise BadRowError(f"{column!r} is {shown(value)}, which is no text or number")


def shown(value: Any) -> str:
    """A value of the data, in few words."""
    return short(value)
