"""What a run shows a person: a table, completions before and after, and a picture of the curve.

Everything is read from the run's own files, so a resumed run reports like an undisturbed one, and one that is still
going or has been stopped like one that has ended.
"""

import io
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import yaml

from rgrl.console import warn
from rgrl.errors import ConfigError
from rgrl.folder import new_owner, not_ours, owner_of, replace
from rgrl.tracking.journal import damaged_lines, read_metrics

MARK = "rgrl_run"  # in a plot's metadata: the run's id

PHASES = ("rollout", "reward", "update", "eval", "checkpoint")
MEASURES = (
    "eval/reward",
    "eval/judge",
    "eval/distinct_1",
    "eval/distinct_2",
    "eval/top_word",
    "eval/length",
    "eval/empty",
    "eval/base_nll",
    "eval/kl",
)
GUARDS = ("eval/distinct_2", "eval/top_word", "eval/length", "eval/base_nll")
Lines = list[dict[str, Any]]
UNREADABLE = (OSError, ValueError, KeyError, TypeError, NotImplementedError)  # tables: pyarrow's own are among them


def check(output_dir: Path) -> None:
    """Raise `ConfigError` unless the folder holds a run with metrics. Lines that cannot be read are told."""
    path = output_dir / "metrics.jsonl"
    try:
        if not output_dir.is_dir():
            raise ConfigError(f"{output_dir}: {'not a folder' if output_dir.exists() else 'no such folder'}")
        if not path.exists():
            raise ConfigError(f"{output_dir} holds no run: it has no metrics.jsonl")
        problem = damaged_lines(path)
        if problem is not None and not read_metrics(path):
            raise ConfigError(f"{problem}, and nothing remains: this is no file of metrics")
    except OSError as error:
        raise ConfigError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    if problem is not None:
        warn(problem)


def at_the_end(output_dir: Path) -> str:
    """The report of a run that has just ended, with its plot, if that can be drawn."""
    try:
        plotted = plot(output_dir)
    except OSError as error:
        plotted = None
        warn(f"the plot cannot be written: {error}")
    return as_text(output_dir, plotted)


def as_text(output_dir: Path, plotted: Path | None) -> str:
    """The whole report; `plotted` is what `plot` returned."""
    where = [f"plot: {plotted}"] if plotted is not None else []
    if (adapter := newest_adapter(output_dir)) is not None:
        where.append(f"adapter: {adapter}")
    return "\n\n".join(filter(None, [summary(output_dir), before_and_after(output_dir), "\n".join(where)]))


def state(output_dir: Path) -> str:
    """How far the run is."""
    lines = read_metrics(output_dir / "metrics.jsonl")
    done = lines[-1]["step"] if lines else 0
    try:
        settings = yaml.safe_load((output_dir / "config.yaml").read_text(encoding="utf-8"))
        total = f" of {int(settings['run']['steps'])}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        total = ""  # a line without it is better than none
    return f"{output_dir}: step {done}{total}"


def summary(output_dir: Path, last_step: int | None = None) -> str:
    """Start and end of the evaluation, or of the rollouts where there is none, and seconds by phase.

    Of the steps up to `last_step` (None: of all).
    """
    lines = [
        line for line in read_metrics(output_dir / "metrics.jsonl") if last_step is None or line["step"] <= last_step
    ]
    evals = [line for line in lines if line.get("eval/reward") is not None]
    rollouts = [line for line in lines if line.get("reward") is not None]
    if evals:
        text = _table("unguided, held-out prompts", evals, _measures(evals))
        for i, row in enumerate(text):
            if row.startswith("eval/top_word "):
                text[i] += _words(output_dir, evals)
        if len(evals) > 1:
            text.append(_verdict(evals[0], evals[-1]))
        if alarms := [str(line["step"]) for line in evals if line.get("hacking/alarm")]:
            text.append(f"looked like reward hacking at step {', '.join(alarms)} (docs/hacking.md)")
    elif rollouts:
        text = _table("rollouts, no evaluation", rollouts, ("reward",))
    else:
        text = ["no step has been logged yet"]
    seconds = {phase: sum(line.get(f"time/{phase}") or 0.0 for line in lines) for phase in PHASES}
    counted = [f"{phase} {value:.0f}" for phase, value in seconds.items() if value >= 0.5]
    if counted:
        text.append("seconds: " + ", ".join(counted))
    return "\n".join(text)


def _measures(evals: Lines) -> tuple[str, ...]:
    """What is told of evaluations: the parts of the reward too, but not one that is all of it."""
    ends = (evals[0], evals[-1])
    parts = [name for name in evals[-1] if re.fullmatch(r"eval/rewards/.+/(mean|pass_at_\d+)", name)]
    told = [name for name in parts if any(line.get(name) != line["eval/reward"] for line in ends)]
    return (MEASURES[0], *told, *MEASURES[1:])


def _table(title: str, lines: Lines, measures: tuple[str, ...]) -> list[str]:
    """A row for each measure that all columns have: the first line, and the last where it is another one."""
    columns = [lines[0], lines[-1]] if len(lines) > 1 else [lines[0]]
    text = [f"{title:<28}" + "".join(f"{'step ' + str(line['step']):>12}" for line in columns)]
    for key in measures:
        values = [line[key] for line in columns if line.get(key) is not None]
        if len(values) < len(columns):
            continue
        spread = columns[0].get(f"{key}_std")
        note = f"   ({(values[1] - values[0]) / spread:+.2f} of its starting sd)" if spread and len(values) > 1 else ""
        text.append(f"{key:<28}" + "".join(f"{value:>12.3f}" for value in values) + note)
    return text


def guards(first: dict[str, Any], last: dict[str, Any]) -> dict[str, str | None]:
    """What a rise of the reward must not cost, by metric: how the last of two evaluations misses it, None if it holds.

    At least 0.9 of the start's distinct_2 and 0.75 of its length, no content word in more than a quarter of the
    completions, at most half a nat a token more under the base. What either lacks is not among them.
    """
    found: dict[str, str | None] = {}
    for key in GUARDS:
        start, now = first.get(key), last.get(key)
        if key == "eval/top_word" and now is not None:
            found[key] = f"{key} is {now:.3g}, above 0.25" if now > 0.25 else None
        elif start is None or now is None:
            continue
        elif key == "eval/base_nll":
            found[key] = f"{key} rose by {now - start:.3g}, more than 0.5" if now > start + 0.5 else None
        else:
            least = 0.9 if key == "eval/distinct_2" else 0.75
            found[key] = f"{key} is {now:.3g}, below {least} of its start, {start:.3g}" if now < least * start else None
    return found


def _verdict(first: dict[str, Any], last: dict[str, Any]) -> str:
    """The guards in one line, also those that nothing is known of."""
    found = guards(first, last)
    missed = "; ".join(words for words in found.values() if words is not None)
    unknown = [key for key in GUARDS if key not in found]
    told = f"guards missed: {missed}" if missed else "guards: none missed"
    return told + (f" (not measured: {', '.join(unknown)})" if unknown else "")


def eval_tables(output_dir: Path) -> dict[int, Path]:
    """The tables of the evaluations in a run's folder, by step."""
    named = ((re.fullmatch(r"eval_(\d+)\.parquet", path.name), path) for path in output_dir.glob("completions/*"))
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def counted_word(output_dir: Path, step: int) -> str | None:
    """The word that `eval/top_word` counts in the evaluation of this step; None if its table cannot tell."""
    try:
        rows = _rows(eval_tables(output_dir)[step])
    except UNREADABLE:
        return None
    return next((row["top_word"] for row in rows if row.get("top_word") is not None), None)


def _words(output_dir: Path, evals: Lines) -> str:
    """The words of the first evaluation and of the last."""
    found = [counted_word(output_dir, step) for step in dict.fromkeys((evals[0]["step"], evals[-1]["step"]))]
    return f"   ({', then '.join(word or '?' for word in found)})" if any(found) else ""


def before_and_after(output_dir: Path, count: int = 4) -> str:
    """The first `count` eval prompts with their completions at the first and the last evaluation."""
    tables = list(eval_tables(output_dir).values())
    try:
        return _samples([_by_index(path) for path in tables[:1] + tables[1:][-1:]], count)
    except UNREADABLE as error:
        return f"samples: a table in {output_dir / 'completions'} cannot be read ({type(error).__name__})"


def _rows(path: Path) -> Lines:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def _by_index(path: Path) -> dict[int, dict[str, Any]]:
    """The first completion of each prompt, by its number."""
    return {row["index"]: row for row in reversed(_rows(path))}


def _samples(ends: list[dict[int, dict[str, Any]]], count: int) -> str:
    """`ends` are the rows of the first and the last evaluation, or of the only one, by the prompt's number."""
    common = sorted(set.intersection(*map(set, ends))) if ends else []  # a resumed run may have other eval prompts
    names = ("before", "after") if len(ends) > 1 else ("now",)
    text = []
    for i in common[:count]:
        text.append(_wrap("[", f"{ends[0][i]['prompt']}]"))
        for name, rows in zip(names, ends, strict=True):
            reward = rows[i]["reward"]
            shown = "-" if reward is None else f"{reward:.2f}"
            text.append(_wrap(f"  {name:<7}{shown:>6}  ", rows[i]["completion"]))
    return "\n".join(text)


def _wrap(start: str, text: str) -> str:
    """Text that goes on below itself where the terminal ends, and is cut after six lines."""
    columns = max(40, shutil.get_terminal_size((120, 24)).columns)
    indent = " " * len(start)
    lines = textwrap.wrap(text.strip(), columns, initial_indent=start, subsequent_indent=indent, max_lines=6)
    return "\n".join(lines) or start.rstrip()


def newest_adapter(output_dir: Path) -> Path | None:
    """The folder of the newest checkpoint's adapter, which `peft` loads; None before the first checkpoint."""
    named = ((re.fullmatch(r"step_(\d+)", path.parent.name), path) for path in output_dir.glob("checkpoints/*/adapter"))
    return max(((int(match[1]), path) for match, path in named if match), default=(0, None))[1]


def plot(output_dir: Path, path: Path | None = None) -> Path | None:
    """Save a picture, `reward.png` by default: the rollouts' reward by step, and the unguided evaluation and its judge.

    Returns its path, or None if there is nothing to show yet. Raises `OSError`, also where there is a picture already
    that was not drawn for this run.
    """
    lines = read_metrics(output_dir / "metrics.jsonl")
    curves = [
        ("reward", {"color": "0.75", "label": "rollouts (training)"}),
        ("eval/reward", {"color": "C0", "marker": "o", "label": "eval reward, unguided"}),
        ("eval/judge", {"color": "C1", "marker": "o", "label": "eval judge, unguided"}),
    ]
    points = {key: [(line["step"], line[key]) for line in lines if line.get(key) is not None] for key, _ in curves}
    if not any(points.values()):
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for key, style in curves:
        if points[key]:
            axes.plot(*zip(*points[key], strict=True), **style)
    axes.set_xlabel("step")
    axes.set_ylabel("score")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = path if path is not None else output_dir / "reward.png"
    owner, content = owner_of(output_dir), io.BytesIO()
    mark = owner.id if owner is not None else "no id"
    figure.savefig(content, format="png", metadata={MARK: mark})
    plt.close(figure)
    if (path.exists() or path.is_symlink()) and mark_of(path) != mark:
        raise not_ours(path)
    replace(path, content.getbuffer(), new_owner())  # a run that is still going may draw its own at the same time
    return path


def mark_of(path: Path) -> str | None:
    """The id of the run that a plot was drawn for; None where it was not drawn here."""
    from PIL import Image  # matplotlib needs it too

    try:
        with Image.open(path) as image:
            return image.info.get(MARK)
    except (OSError, ValueError, SyntaxError):  # Pillow's own for what is broken
        return None
