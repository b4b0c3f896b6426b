"""Score a run's saved completions with another judge, so that a run can be read again without being repeated."""

import csv
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from rgrl.console import warn
from rgrl.errors import ConfigError
from rgrl.evaluation.intervals import by_prompt, mean_and_half
from rgrl.rewards import ClassifierReward, load_classifier
from rgrl.rewards.total import check_finite
from rgrl.types import Prompt, Prompts

NEEDED = ("index", "prompt", "completion")
SCORES = ("reward", "judge")  # what the run itself wrote beside them; a table may have neither
PARTS = "rewards/"  # what columns with a part of the reward begin with; tables of older runs have none


@dataclass(frozen=True)
class Table:
    """The completions of one evaluation, by prompt number, one or more of each, and the scores of each, by name."""

    step: int
    index: list[int]
    prompts: list[str]
    completions: list[str]
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    chats: list[Prompt] = field(default_factory=list)  # what a judge is shown; none: the prompts
    truncated: int = 0  # texts that were too long for the new judge, and lost the beginning of their prompt


def read_tables(run: Path) -> list[Table]:
    """The evaluations of a run, by step, whether it has ended or not. Raises `ConfigError` where there are none."""
    if not run.is_dir():
        raise ConfigError(f"{run}: {'not a folder' if run.exists() else 'no such folder'}")
    named = ((re.fullmatch(r"eval_(\d+)\.parquet", path.name), path) for path in run.glob("completions/*"))
    paths = dict(sorted((int(match[1]), path) for match, path in named if match))
    if not paths:
        raise ConfigError(
            f"{run} has no completions to judge: there is no completions/eval_*.parquet, which a run with "
            "`data.eval_path` writes at each evaluation"
        )
    return [_read(step, path) for step, path in paths.items()]


def _read(step: int, path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not rows:
        raise ConfigError(f"{path} holds no completions")
    if lacking := [name for name in NEEDED if name not in rows[0]]:
        raise ConfigError(f"{path} is no table of an evaluation: it has no column {lacking[0]!r}")
    for name, kind in zip(NEEDED, (int, str, str), strict=True):
        if odd := [row[name] for row in rows if type(row[name]) is not kind]:
            raise ConfigError(f"{path}: {odd[0]!r} in the column {name!r} is not {kind.__name__}")
    rows.sort(key=lambda row: row["index"])  # a table has the completions of a prompt in order
    names = [*SCORES, *(name for name in rows[0] if name.startswith(PARTS))]
    scores = {name: [row.get(name) for row in rows] for name in names}
    numbers = {name: each for name, each in scores.items() if _are_scores(each)}
    index, prompts, completions = ([row[name] for row in rows] for name in NEEDED)
    return Table(step, index, prompts, completions, numbers, [_chat(row, path) for row in rows])


def _chat(row: dict[str, Any], path: Path) -> Prompt:
    """What was said in a prompt: its column `chat` where it is a chat of several turns, else its text."""
    if row.get("chat") is None:
        return row["prompt"]
    try:
        chat = json.loads(row["chat"])
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: the column 'chat' of prompt {row['index']} is not JSON") from error
    if not (isinstance(chat, list) and chat and all(isinstance(turn, dict) for turn in chat)) or not all(
        isinstance(turn.get(key), str) for turn in chat for key in ("role", "content")
    ):
        raise ConfigError(f"{path}: the column 'chat' of prompt {row['index']} is no list of turns")
    return chat


def completion_length(run: Path) -> int:
    """`rollout.max_completion_length` of the run; 0 with a warning where its config.yaml does not tell.

    The run's own judge kept as many tokens free, so that a prompt was cut at the same place whatever its completion.
    """
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return int(settings["rollout"]["max_completion_length"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        warn(
            f"{run / 'config.yaml'} does not tell the length of completions ({type(error).__name__}): prompts that are "
            "too long for the judge are cut to fit each completion, not all alike"
        )
        return 0


def load(path: str, adapter: str | None, dtype: str, max_length: int) -> ClassifierReward:
    """The judge, on the first GPU if there is one. Raises `ConfigError`."""
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {adapter}: no adapter_config.json there")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_classifier(path, device, dtype, adapter, "judge", max_length)


def with_bar(tables: list[Table], judge: ClassifierReward, batch: int) -> list[Table]:
    """`rejudge`, which shows on the terminal how far it is."""
    with tqdm(bar_format="rgrl: {desc} [{elapsed}]", leave=False) as bar:
        return rejudge(tables, judge, batch, bar.set_description_str)


def rejudge(tables: list[Table], judge: ClassifierReward, batch: int, tell: Callable[[str], None]) -> list[Table]:
    """The tables with the judge's scores, as "new". `tell` is given a few words before each batch of completions.

    Raises `ConfigError` for a score that is not finite, and a text that is too long for the judge.
    """
    total, done, judged = sum(len(table.index) for table in tables), 0, []
    for table in tables:
        scores, truncated = list[float | None](), 0
        for start in range(0, len(table.index), batch):
            tell(f"judging {done}/{total}")
            texts = table.prompts[start : start + batch]
            prompts = Prompts(texts, [{} for _ in texts], chats=table.chats[start : start + batch])
            completions = table.completions[start : start + batch]
            found = judge.score(prompts, completions)
            check_finite(judge.name, found.reward_B, prompts, completions)
            scores += found.reward_B.tolist()
            truncated += found.truncated
            done += len(texts)
        judged.append(replace(table, scores=table.scores | {"new": scores}, truncated=truncated))
    return judged


def summary(tables: list[Table]) -> list[dict[str, float | int | None]]:
    """A line for each table: step, number of completions, and mean and half of the 95 % interval of each score.

    Intervals are over prompts: of a prompt's completions the mean counts. `change` is that of the new score since the
    first table, over the prompts that both have, compared one by one. What a table lacks is None, as is the half for a
    single prompt. Parts of the reward (`rewards/<name>`) are told where any table has them.
    """
    first, lines = tables[0], []
    parts = dict.fromkeys(name for table in tables for name in table.scores if name.startswith(PARTS))
    for table in tables:
        line: dict[str, float | int | None] = {"step": table.step, "n": len(table.index)}
        for name in (*SCORES, *parts, "new"):
            line |= _with_half(name, [x for x in _of_prompts(table, name).values() if x is not None])
        line |= _with_half("change", _differences(first, table) if table is not first else [])
        lines.append(line)
    return lines


def _are_scores(values: list[Any]) -> bool:
    """Whether they are numbers, or None for a completion without a reward, but not all None."""
    return all(isinstance(x, int | float | None) for x in values) and any(x is not None for x in values)


def _of_prompts(table: Table, name: str) -> dict[tuple[int, str], float | None]:
    """The mean of a score over the completions of each prompt, by number and text; empty if the table lacks it."""
    prompts = list(zip(table.index, table.prompts, strict=True))
    found = table.scores.get(name)
    return {} if found is None else dict(zip(dict.fromkeys(prompts), by_prompt(prompts, found), strict=True))


def _with_half(name: str, values: list[float]) -> dict[str, float | int | None]:
    if not values:
        return {name: None, _half_of(name): None}
    mean, half = mean_and_half(values)
    return {name: mean, _half_of(name): None if math.isnan(half) else half}


def _half_of(name: str) -> str:
    """What the half of an interval is called: no part of the reward can have the same name."""
    return f"half of {name}" if name.startswith(PARTS) else f"{name}_half"


def _differences(first: Table, table: Table) -> list[float]:
    """The change of the new score of each prompt that both tables have under the same number."""
    before, now = _of_prompts(first, "new"), _of_prompts(table, "new")
    pairs = [(before.get(prompt), score) for prompt, score in now.items()]
    return [score - start for start, score in pairs if start is not None and score is not None]


def as_text(lines: list[dict[str, Any]]) -> str:
    """Such lines as a table for people."""
    parts = [name for name in lines[0] if name.startswith(PARTS)]
    heads = {"reward": "reward"}
    # The only part of a reward is the reward itself.
    heads |= {name: name.removeprefix(PARTS)[:17] for name in parts if any(x[name] != x["reward"] for x in lines)}
    heads |= {"judge": "judge", "new": "this judge", "change": "since the first"}
    text = [f"{'step':>6}{'n':>7}" + "".join(f"{head:>18}" for head in heads.values())]
    for line in lines:
        cells = []
        for name in heads:
            mean, half = line[name], line[_half_of(name)]
            value = "-" if mean is None else f"{mean:+.2f}" if name == "change" else f"{mean:.2f}"
            cells.append(f"{value if half is None else f'{value} ± {half:.2f}':>18}")
        text.append(f"{line['step']:>6}{line['n']:>7}" + "".join(cells))
    return "\n".join(text)


def check_output(path: Path) -> None:
    """Raise `ConfigError` unless a file of this name can be made: nothing is ever overwritten."""
    if path.suffix != ".csv":
        raise ConfigError(f"--output {path}: expected a name that ends with .csv")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"--output {path}: there is such a file already, and nothing is overwritten; name another")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--output {path}: {path.parent} is not a folder to write in")


def write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    """Such lines as a CSV file, which must not exist. Raises `ConfigError`."""
    try:
        with path.open("x", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from error
