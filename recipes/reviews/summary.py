"""What `compare.py` prints and draws: tables over seeds with intervals, guards, curves, completions."""

import itertools
import json
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

from rgrl.tracking import read_metrics
from rgrl.tracking.report import GUARDS, guards

NUMBERS = ("eval/reward", "eval/judge", "eval/ridge", "eval/distinct_1", "eval/distinct_2", "eval/top_word")
NUMBERS += ("eval/length", "eval/empty", "eval/base_nll", "eval/kl")
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by number of seeds
Found = dict[str, dict]  # of one run: `before` and `after` training


@dataclass
class Results:
    """The runs of one comparison, by variant, one for each of `seeds`."""

    out: Path
    seeds: list[int]
    steps: dict[str, int]
    seconds: dict[str, float]  # of a step, over that of the reference
    finals: dict[str, list[Found]]
    curves: dict[str, list[list[dict]]]  # evaluations on the way, the first before training


def folder_of(out: Path, name: str, seed: int) -> Path:
    return out / name.replace(" ", "_") / str(seed)


def collect(out: Path, names: list[str], seeds: list[int], steps: dict[str, int], seconds: dict[str, float]) -> Results:
    """Read finished runs."""
    finals, curves = {}, {}
    for name in names:
        folders = [folder_of(out, name, seed) for seed in seeds]
        logged = [read_metrics(folder / "metrics.jsonl") for folder in folders]
        curves[name] = [[line for line in lines if "eval/reward" in line] for lines in logged]
        finals[name] = [json.loads((folder / "final.json").read_text()) for folder in folders]
    return Results(out, seeds, steps, seconds, finals, curves)


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t over seeds)."""
    n = len(values)
    return statistics.mean(values), T_975[n] * statistics.stdev(values) / n**0.5 if n in T_975 else float("nan")


def reached(lines: list[dict], goal: float) -> float | None:
    """The fraction of the budget at which the evaluation first reaches `goal`, interpolated between evaluations."""
    points = [(line["step"] / lines[-1]["step"], line["eval/reward"]) for line in lines]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 >= goal:
            return x0 + (x1 - x0) * max(0.0, (goal - y0) / (y1 - y0))
    return None


def print_ends(results: Results) -> None:
    """The last evaluation of each variant, and the first of all."""
    print(f"\n{'variant':<34}{'step':>6}{'steps':>6}" + "".join(f"{n.removeprefix('eval/'):>15}" for n in NUMBERS))
    for name, found in results.finals.items():
        cells = ""
        for number in NUMBERS:
            mean, half = mean_and_half([each["after"][number] for each in found])
            cells += f"{mean:>8.2f} ± {half:<4.2f}"
        print(f"{name:<34}{results.seconds[name]:>6.2f}{results.steps[name]:>6}" + cells)
    starts = [each["before"] for found in results.finals.values() for each in found]
    cells = "".join(f"{statistics.mean(each[number] for each in starts):>8.2f}{'':<7}" for number in NUMBERS)
    print(f"{'before training':<34}{'':>6}{0:>6}" + cells)


def print_guards(results: Results) -> None:
    """For each variant: how many seeds miss each guard, where the alarm rang, and the most common word of each seed."""
    print("\nseeds that miss a guard (docs/hacking.md), evaluations that rang the alarm, most common word by seed:")
    for name, found in results.finals.items():
        missed = [guards(each["before"], each["after"]) for each in found]
        cells = [f"{key.removeprefix('eval/')} {sum(one[key] is not None for one in missed)}" for key in GUARDS]
        rang = sum(bool(line.get("hacking/alarm")) for lines in results.curves[name] for line in lines)
        words = [common_word(folder_of(results.out, name, seed) / "final.jsonl") for seed in results.seeds]
        looks = sum(map(len, results.curves[name]))
        print(f"{name:<34}of {len(found)}: {'  '.join(cells)}  alarm {rang}/{looks}  {', '.join(words)}")


def common_word(path: Path) -> str:
    """The content word that the most completions of an evaluation hold."""
    rows = map(json.loads, path.read_text().splitlines())
    return next((row["top_word"] for row in rows if row["top_word"] is not None), "-")


def print_against(results: Results, reference: str) -> None:
    """Each variant less the reference, seed by seed, and how soon it has the reference's last reward."""
    print(
        f"\nagainst {reference} seed by seed, and the share of the budget to that seed's final reward of {reference}:"
    )
    goals = [lines[-1]["eval/reward"] for lines in results.curves[reference]]
    for name, runs in results.curves.items():
        cells = ""
        for number in ("eval/reward", "eval/judge", "eval/ridge"):
            pairs = zip(results.finals[name], results.finals[reference], strict=True)
            mean, half = mean_and_half([one["after"][number] - other["after"][number] for one, other in pairs])
            cells += f"{number.removeprefix('eval/'):>8} {mean:+.2f} ± {half:<4.2f}"
        when = [reached(lines, goal) for lines, goal in zip(runs, goals, strict=True)]
        print(f"{name:<34}{cells}   " + "  ".join("never" if x is None else f"{x:.2f}" for x in when))


def mean_curve(runs: list[list[dict]], key: str) -> list[float]:
    """The mean over seeds at each evaluation."""
    return [statistics.mean(lines[i][key] for lines in runs) for i in range(min(map(len, runs)))]


def print_curves(results: Results) -> None:
    print("\nreward and judge against KL to the base (mean over seeds), by evaluation:")
    for name, runs in results.curves.items():
        kl, reward, judge = (mean_curve(runs, key) for key in ("eval/kl", "eval/reward", "eval/judge"))
        points = (f"{k:.2f}:{r:.2f}/{j:.2f}" for k, r, j in zip(kl, reward, judge, strict=True))
        print(f"{name:<34}" + "  ".join(points))


def print_samples(results: Results, count: int) -> None:
    """The first completions of each variant after training, with its first seed."""
    for name in results.finals if count else ():
        print(f"\n{name}, seed {results.seeds[0]}:")
        rows = (folder_of(results.out, name, results.seeds[0]) / "final.jsonl").read_text().splitlines()[:count]
        for row in map(json.loads, rows):
            text = f"{row['reward']:6.2f}{row['judge']:6.2f}  {row['prompt']} | {row['completion'].strip()}"
            print(textwrap.shorten(text, 160, placeholder=" …"))


def draw(results: Results, path: Path) -> None:
    """Reward and judge by share of the budget and by KL, the mean over seeds, and each seed's judge as a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), dpi=110, sharey="row")
    for i, (name, runs) in enumerate(results.curves.items()):
        kl = mean_curve(runs, "eval/kl")
        share = [line["step"] / runs[0][-1]["step"] for line in runs[0][: len(kl)]]
        for row, key in zip(axes, ("eval/reward", "eval/judge"), strict=True):
            mean = mean_curve(runs, key)
            row[0].plot(share, mean, color=f"C{i}", label=name)
            row[1].plot(kl, mean, color=f"C{i}", marker=".", label=name)
            for lines in runs:
                row[0].plot(share, [line[key] for line in lines[: len(kl)]], color=f"C{i}", linewidth=0.5, alpha=0.4)
    for row, label in zip(axes, ("reward, held out", "judge, held out"), strict=True):
        row[0].set_ylabel(label)
    for axis, label in zip(axes[1], ("share of the time", "KL to the base, nats a token"), strict=True):
        axis.set_xlabel(label)
    axes[0][0].legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
