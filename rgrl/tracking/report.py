"""What a finished run shows a person: a table, completions before and after, and a picture of the curve.

Everything is read from the run's own files, so a resumed run reports like an undisturbed one.
"""

from pathlib import Path

from rgrl.tracking.journal import read_metrics

PHASES = ("rollout", "reward", "update", "eval", "checkpoint")


def summary(output_dir: Path) -> str:
    """Start and end of the evaluation, and seconds by phase, as a text table."""
    lines = read_metrics(output_dir / "metrics.jsonl")
    evals = [line for line in lines if "eval/reward" in line]
    text = []
    if len(evals) > 1:
        first, last = evals[0], evals[-1]
        text.append(
            f"{'unguided, held-out prompts':<28}{'step ' + str(first['step']):>10}{'step ' + str(last['step']):>10}"
        )
        for key in ("eval/reward", "eval/judge", "eval/distinct_2", "eval/base_nll", "eval/length"):
            if first.get(key) is not None and last.get(key) is not None:
                spread = first.get(f"{key}_std")
                note = f"   ({(last[key] - first[key]) / spread:+.2f} of its starting sd)" if spread else ""
                text.append(f"{key:<28}{first[key]:>10.3f}{last[key]:>10.3f}{note}")
    seconds = {phase: sum(line.get(f"time/{phase}") or 0.0 for line in lines) for phase in PHASES}
    text.append("seconds: " + ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items() if value >= 0.5))
    return "\n".join(text)


def before_and_after(output_dir: Path, count: int = 4, width: int = 56) -> str:
    """The first `count` eval prompts with their completions at the first and the last evaluation."""
    import pyarrow.parquet as pq

    tables = sorted((output_dir / "completions").glob("eval_*.parquet"))
    if len(tables) < 2:
        return ""
    first, last = (pq.read_table(tables[i]).to_pylist() for i in (0, -1))
    text = []
    for before, after in list(zip(first, last, strict=True))[:count]:
        text.append(f"[{before['prompt']}]")
        for name, row in (("before", before), ("after", after)):
            text.append(f"  {name:<7}{row['reward']:>6.2f}  {row['completion'].strip()}")
    return "\n".join(text)


def plot(output_dir: Path) -> Path | None:
    """Save `reward.png`: the training rollouts' reward by step, and the unguided evaluation with its judge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(output_dir / "metrics.jsonl")
    train = [(line["step"], line["reward"]) for line in lines if line.get("reward") is not None]
    evals = [line for line in lines if line.get("eval/reward") is not None]
    if not train:
        return None
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    axes.plot(*zip(*train, strict=True), color="0.75", label="rollouts (training)")
    for key, label, colour in (
        ("eval/reward", "eval reward, unguided", "C0"),
        ("eval/judge", "eval judge, unguided", "C1"),
    ):
        points = [(line["step"], line[key]) for line in evals if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("score")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = output_dir / "reward.png"
    figure.savefig(path)
    plt.close(figure)
    return path
