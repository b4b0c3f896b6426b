"""The prompts of a run: rows of a data set, what is left out of them, and what the rest says. All read by number."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rgrl.config import DataConfig
from rgrl.config.explain import short
from rgrl.data.rows import Bad, ListRows, Row, Rows
from rgrl.data.said import columns_in, prompt_of
from rgrl.data.sources import Source, open_rows
from rgrl.errors import ConfigError
from rgrl.types import Prompt, Prompts, transcript, turns_of, with_last, without_oldest

BATCH = 1024  # rows read at a time


@dataclass(frozen=True)
class Tally:
    """What became of the rows, in numbers. `first_bad` says where the first bad one stands, and what is wrong."""

    rows: int = 0
    bad: int = 0
    first_bad: str = ""
    elsewhere: int = 0  # left out by `data.where`
    duplicates: int = 0
    evaluated: int = 0  # left out as evaluation uses the same text
    held_out: int = 0  # left for evaluation by `data.eval_fraction`
    short: int = 0
    dropped: int = 0  # too long, and not to be cut or without text once they are
    truncated: int = 0
    trained: int = 0  # left out of evaluation, as training has the same text once one of the two is cut

    def words(self) -> str:
        """What was left out or cut; empty if nothing was."""
        told = {
            f"bad (the first: {self.first_bad})": self.bad,
            "left out by data.where": self.elsewhere,
            "duplicates": self.duplicates,
            "that evaluation uses too": self.evaluated,
            "held out for evaluation": self.held_out,
            "shorter than data.min_prompt_length": self.short,
            "longer than data.max_prompt_length and left out": self.dropped,
            "longer than data.max_prompt_length and cut": self.truncated,
            "that are trained on too, once they are cut": self.trained,
        }
        return ", ".join(f"{n:,} {what}" for what, n in told.items() if n)


@dataclass(frozen=True)
class Cut:
    """What a prompt loses: its oldest turns, so many times (`without_oldest`), and the last one's first characters."""

    turns: int = 0
    characters: int = 0

    def of(self, prompt: Prompt) -> Prompt:
        """The rest of the prompt."""
        for _ in range(self.turns):
            fewer = without_oldest(prompt)
            assert fewer is not None
            prompt = fewer
        return with_last(prompt, turns_of(prompt)[-1]["content"][self.characters :]) if self.characters else prompt


@dataclass(frozen=True)
class PromptSet:
    """P prompts, of which none is in memory: `take` reads them."""

    source: Source
    config: DataConfig
    data: Rows
    number_P: np.ndarray  # int64, of each prompt's row
    columns: list[str]  # every column that some row has
    tally: Tally
    shapes: dict[tuple[str, ...], int]  # the roles of chats -> the number of the first row with them
    cuts: dict[int, Cut] = field(default_factory=dict)  # by the number of the row
    template: Callable[[Prompt], str] | None = None

    def __len__(self) -> int:
        return len(self.number_P)

    def take(self, index: Sequence[int]) -> Prompts:
        """The prompts with these numbers. Raises `ConfigError` where the data are not what they were."""
        numbers = [int(self.number_P[i]) for i in index]
        rows: list[Row] = []
        chats: list[Prompt] = []
        for number, row in zip(numbers, self.data.read(numbers), strict=True):
            prompt = row if isinstance(row, Bad) else prompt_of(row, self.config)
            if isinstance(row, Bad) or isinstance(prompt, Bad):
                raise ConfigError(f"{self.source}: {self.data.told(number, 'is another now')}", on_one_rank=True)
            rows.append(row)
            chats.append(self.cuts[number].of(prompt) if number in self.cuts else prompt)
        texts = [transcript(prompt) for prompt in chats]
        inputs = [self.template(prompt) for prompt in chats] if self.template is not None else texts
        return Prompts(texts, rows, inputs, chats)

    def batches(self, size: int = BATCH) -> Iterator[Prompts]:
        """All of them in their order, so many at a time."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    def formatted(self, template: Callable[[Prompt], str]) -> "PromptSet":
        """The same prompts with `template` applied when they are read."""
        return replace(self, template=template)

    def only(self, which_P: np.ndarray, **counts: int) -> "PromptSet":
        """Some of the prompts, by a mask or by number; `counts` are added to the tally."""
        added = {name: getattr(self.tally, name) + n for name, n in counts.items()}
        return replace(self, number_P=self.number_P[which_P], tally=replace(self.tally, **added))

    def told(self, i: int, why: str) -> str:
        """What is wrong with prompt `i`, with the file and where in it the row stands."""
        return f"{self.source}: {self.data.told(int(self.number_P[i]), why)}"

    @property
    def texts(self) -> list[str]:
        """All texts, in memory."""
        return [text for batch in self.batches() for text in batch.texts]

    @property
    def rows(self) -> list[Row]:
        """All rows, in memory."""
        return [row for batch in self.batches() for row in batch.rows]


def load_data(config: DataConfig, evaluates: bool = True) -> tuple[PromptSet, PromptSet | None]:
    """Training and evaluation prompts; None where the settings name none, or nothing `evaluates`.

    With `data.eval_fraction` the held-out prompts are left out of the training prompts either way. Raises
    `ConfigError`.
    """
    c = config
    training, hash_P = _scan(_training_source(c), c)
    evaluation: PromptSet | None = None
    if c.eval_fraction:
        out_P = hash_P < np.uint64(int(c.eval_fraction * 2**64))
        evaluation = training.only(out_P)
        training = training.only(~out_P, held_out=int(out_P.sum()))
        for prompts, what in ((training, "train on"), (evaluation, "evaluate on")):
            if not len(prompts):
                raise ConfigError(
                    f"{training.source}: `data.eval_fraction` {c.eval_fraction} of {len(hash_P)} prompts leaves none "
                    f"to {what}"
                )
    elif (source := _evaluation_source(c, training.data.commit)) is not None and (evaluates or c.deduplicate):
        evaluation, eval_hash_P = _scan(source, c)
        if c.deduplicate:
            used_P = np.isin(hash_P, eval_hash_P)
            if used_P.all():
                raise ConfigError(f"{training.source}: evaluation uses every prompt (`data.deduplicate`)")
            training = training.only(~used_P, evaluated=int(used_P.sum()))
    return training, evaluation if evaluates else None


def load_prompts(path: str, config: DataConfig) -> PromptSet:
    """The prompts of one file, folder or data set of the Hub, all of them. Raises `ConfigError`."""
    return _scan(replace(_training_source(config), path=path), config)[0]


def _training_source(c: DataConfig) -> Source:
    if c.generate is not None:
        return Source(f"data.generate {c.generate}")
    return Source(c.path, c.split, c.subset, c.revision, most=c.max_rows, chosen=c.split != "train")


def _evaluation_source(c: DataConfig, commit: str | None) -> Source | None:
    """Where evaluation prompts are; another split of the training data is read at the same `commit`."""
    if c.eval_path is not None:
        split, chosen = c.eval_split or c.split, c.eval_split is not None
        return Source(c.eval_path, split, c.eval_subset, c.eval_revision, "eval_", chosen=chosen)
    if c.eval_split is None:
        return None
    return Source(c.path, c.eval_split, c.subset, commit or c.revision, "eval_", chosen=True)


def _rows(source: Source, config: DataConfig) -> Rows:
    if config.generate is None or source.eval_:
        return open_rows(source)
    from rgrl.data.puzzles import make

    rows = make(config.generate, config.generate_rows, config.generate_seed)
    return ListRows(rows[: config.max_rows])


# ---------------------------------------------------------------------------------------------------- one pass
class _Scan:
    """What one pass over all rows finds."""

    def __init__(self, config: DataConfig) -> None:
        self.config, self.columns = config, dict[str, None]()
        self.kept, self.hashes, self.bad = array("q"), array("Q"), array("q")
        self.why = ""  # what is wrong with the first bad row
        self.elsewhere = 0
        self.hashed = config.deduplicate or config.eval_fraction > 0
        self.shapes: dict[tuple[str, ...], int] = {}
        self.where = {name: value if isinstance(value, list) else [value] for name, value in config.where.items()}

    def look(self, number: int, row: Row | Bad) -> None:
        """Take in the next row."""
        if isinstance(row, Bad):
            return self._reject(number, row)
        if not row.keys() <= self.columns.keys():
            self.columns |= dict.fromkeys(row)
        if self.where and not all(
            any(_same(row.get(name), one) for one in values) for name, values in self.where.items()
        ):
            self.elsewhere += 1
            return None
        prompt = prompt_of(row, self.config)
        if isinstance(prompt, Bad):
            return self._reject(number, prompt)
        if not isinstance(prompt, str):
            self.shapes.setdefault(tuple(turn["role"] for turn in prompt), number)
        self.kept.append(number)
        if self.hashed:
            digest = hashlib.sha256(transcript(prompt).encode()).digest()
            self.hashes.append(int.from_bytes(digest[:8], "big"))
        return None

    def _reject(self, number: int, bad: Bad) -> None:
        self.why = self.why or bad.why
        self.bad.append(number)


def _same(value: object, wanted: object) -> bool:
    """Whether a row has what `data.where` asks for; true is no number."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _scan(source: Source, config: DataConfig) -> tuple[PromptSet, np.ndarray]:
    """The prompts of all good rows, and where settings need it the hash (uint64) of each one's text, else nothing.

    Raises `ConfigError`.
    """
    data = _rows(source, config)
    if not len(data):
        raise ConfigError(f"{source} has no rows: expected at least one prompt")
    scan = _Scan(config)
    for start in range(0, len(data), BATCH):
        numbers = range(start, min(start + BATCH, len(data)))
        for number, row in zip(numbers, data.read(numbers), strict=True):
            scan.look(number, row)
    _check_columns(source, config, list(scan.columns))
    first_bad = f"{source}: {data.told(scan.bad[0], scan.why)}" if scan.bad else ""
    tally = Tally(len(data), len(scan.bad), first_bad, scan.elsewhere)
    if tally.bad > config.max_bad * tally.rows:
        raise ConfigError(too_many_bad(tally, config))
    number_P, hash_P = np.array(scan.kept, dtype=np.int64), np.array(scan.hashes, dtype=np.uint64)
    prompts = PromptSet(source, config, data, number_P, sorted(scan.columns), tally, scan.shapes)
    if config.deduplicate:
        first_P = np.zeros(len(hash_P), dtype=bool)
        first_P[np.unique(hash_P, return_index=True)[1]] = True
        prompts, hash_P = prompts.only(first_P, duplicates=int((~first_P).sum())), hash_P[first_P]
    if not len(prompts):
        raise ConfigError(_none_left(prompts))
    return prompts, hash_P


def too_many_bad(tally: Tally, config: DataConfig) -> str:
    """The message of a run that refuses to start for bad rows."""
    if tally.bad == 1 and not config.max_bad:
        return f"{tally.first_bad} (`data.max_bad` leaves out a fraction of bad rows)"
    return f"{tally.first_bad}; {tally.bad:,} of {tally.rows:,} rows are bad, and `data.max_bad` is {config.max_bad:g}"


def _check_columns(source: Source, config: DataConfig, columns: list[str]) -> None:
    """Refuse a column that no row has. Where no row could be read, that is what is wrong. Raises `ConfigError`."""
    named = columns_in(config.template) if config.template is not None else [config.column]
    settings = {name: "`data.template`" if config.template is not None else "`data.column`" for name in named}
    settings |= dict.fromkeys(config.where, "`data.where`")
    for name, setting in settings.items():
        if columns and name not in columns:
            raise ConfigError(f"{source} has no column {name!r} ({setting}); it has {', '.join(columns)}")


def _none_left(prompts: PromptSet) -> str:
    """The message where every row was left out, with what there is of the columns in `data.where`."""
    seen: dict[str, dict[str, None]] = {name: {} for name in prompts.config.where}
    for row in prompts.data.read(range(min(BATCH, len(prompts.data)))):
        for name, values in seen.items():
            if not isinstance(row, Bad) and len(values) < 5:
                values[short(row.get(name))] = None
    told = "".join(f"; {name!r} is {' or '.join(values)} in the first rows" for name, values in seen.items() if values)
    return f"{prompts.source}: no prompt is left of {prompts.tally.rows:,} rows: {prompts.tally.words()}{told}"
