"""Compare ways of training on the reviews recipe at equal wall clock: seeds, intervals, curves.

    python recipes/reviews/compare.py --out runs/compare
    python recipes/reviews/compare.py --out runs/compare --set ablation --seeds 0 1
    python recipes/reviews/compare.py --out runs/bridge --set bridge

Steps cost more or less, so first a step of each variant is timed, all of them in turn: in processor seconds of one
thread, which are its wall clock where nothing else runs. Each then gets as many steps as fit into the time of
`--budget` diffu-GRPO steps, evaluations not counted. At its end a run is evaluated as `final.py` does: 256 held-out
openings, the strong judge, the ridge judge, and the guards against the same before training. Complete runs are kept.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from final import PROMPTS, strong_judge

from rgrl.config import load_config
from rgrl.data import PromptStream
from rgrl.runtime.clock import Clock
from rgrl.setup import set_up
from rgrl.step import rollout_step, update_step
from rgrl.tracking import read_metrics
from rgrl.tracking.report import GUARDS, guards

HERE = Path(__file__).parent
REFERENCE = "diffu_grpo"
# name -> (recipe, overrides)
MAIN = {name: (name, []) for name in ("likelihood", "aps_likelihood", REFERENCE, "guided", "rgrl")}
# What the ablation starts from, whatever the shipped recipe has become: each line changes one thing, or says which.
PLAIN = (
    "--objective.name reinforce --objective.estimator one_step --objective.iterations 1 --objective.correction none "
    "--guidance.kind entrgi --guidance.share 1.0 --guidance.support guided --rollout.block_length 0 "
    "--optim.learning_rate 4e-4 --optim.schedule constant --objective.beta 0.075"
).split()


def changed(*words: str) -> tuple[str, list[str]]:
    return "rgrl", [*PLAIN, *words]


FOUR = ["--objective.name", "grpo", "--objective.iterations", "4"]
BOTH = [*FOUR, "--guidance.share", "0.5", "--rollout.block_length", "10"]
ABLATION = {
    "plain": changed(),
    "unguided": changed("--guidance.kind", "none"),
    "half guided": changed("--guidance.share", "0.5"),
    "half guided, truncate": changed("--guidance.share", "0.5", "--objective.correction", "truncate"),
    "4 updates": changed(*FOUR),
    "unguided, 4 updates": changed(*FOUR, "--guidance.kind", "none"),
    "half guided, 4 updates": changed(*FOUR, "--guidance.share", "0.5"),
    "half guided, 4 updates, blocks": changed(*BOTH),
    "half guided, 4 updates, blocks, falling rate": changed(*BOTH, "--optim.schedule", "linear"),
    "half guided, 4 updates, blocks, falling rate, double KL": changed(
        *BOTH, "--optim.schedule", "linear", "--objective.beta", "0.15"
    ),
    "fading, half guided, blocks": changed(
        "--guidance.eta_final", "0.0", "--guidance.share", "0.5", "--rollout.block_length", "10"
    ),
    "unguided, blocks": changed("--guidance.kind", "none", "--rollout.block_length", "10"),
    "unguided, blocks, coupled": changed(
        *"--guidance.kind none --rollout.block_length 10 --objective.estimator coupled".split()
    ),
    "unguided, blocks, trajectory_sampled": changed(
        *"--guidance.kind none --rollout.block_length 10 --objective.estimator trajectory_sampled".split()
    ),
    "unguided, 4 updates, blocks": changed(
        *FOUR, *"--guidance.kind none --rollout.block_length 10 --objective.beta 0.1".split()
    ),
    "half guided, 4 updates, blocks, mask": changed(*BOTH, "--objective.correction", "mask"),
    "unguided, double rate": changed("--guidance.kind", "none", "--optim.learning_rate", "8e-4"),
    "unguided, blocks, double rate": changed(
        *"--guidance.kind none --rollout.block_length 10 --optim.learning_rate 8e-4".split()
    ),
}
# What the guide is shown of tokens that its own tokenizer does not have.
BRIDGE = {mode: ("llada", ["--reward.bridge", mode]) for mode in ("compose", "unknown", "zero")}
# The reward's own gradient in the update (docs/experiments.md).
GRADIENT = {
    "gradient": ("gradient", []),
    "gradient, unguided": ("gradient", ["--guidance.kind", "none"]),
    "gradient, centred": ("gradient", ["--gradient.centre", "batch"]),
}
SETS = {"main": MAIN, "ablation": ABLATION, "bridge": BRIDGE, "gradient": GRADIENT | MAIN}
NUMBERS = ("eval/reward", "eval/judge", "eval/distinct_1", "eval/distinct_2", "eval/top_word", "eval/length")
NUMBERS += ("eval/empty", "eval/base_nll", "eval/kl", "eval/ridge")
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by number of seeds


def words_of(variants: dict, name: str) -> list[str]:
    recipe, overrides = variants[name]
    return [str(HERE / f"{recipe}.yaml"), *overrides]


def seconds_per_step(variants: dict, rounds: int) -> dict[str, float]:
    """Processor seconds of a rollout and an update of each variant, the median of rounds in which all take turns."""
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {name: [] for name in variants}
    runs = {}
    for name in variants:
        path, *overrides = words_of(variants, name)
        config = load_config(path, [*overrides, "--optim.learning_rate", "1e-12", "--judge.path", "null"])
        runs[name] = set_up(config, Accelerator(cpu=True))
    for round_ in range(rounds + 1):
        for name, one in runs.items():
            stream = PromptStream(one.stream.prompts, round_, one.config.run.prompts_per_device, 1)
            start = time.process_time()
            # Half-way, where guidance that fades has half its strength.
            scored = rollout_step(replace(one, stream=stream), one.config.run.steps // 2, Clock())
            update_step(one, scored, 0, 0, Clock())
            if round_ > 0:  # the first round warms up
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def run(variants: dict, name: str, seed: int, steps: int, args: argparse.Namespace) -> None:
    """Train one variant with one seed, and evaluate what came out, on one thread."""
    folder = folder_of(args.out, name, seed)
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines or lines[-1]["step"] != steps:
        path, *overrides = words_of(variants, name)
        words = ["--config", path, *overrides, "--run.seed", str(seed), "--run.steps", str(steps)]
        words += ["--run.eval_steps", str(max(1, steps // args.evals)), "--run.save_steps", "0"]
        words += ["--judge.path", str(args.judge), "--tracking.wandb", "false", "--tracking.completions_steps", "0"]
        words += ["--guidance.probe_prompts", "0", "--run.output_dir", str(folder)]
        on_one_thread([str(HERE.parent / "train.py"), *words])
    words = ["--judge", str(args.judge), "--prompts", str(args.prompts), "--cache", str(args.out / "before")]
    on_one_thread([str(HERE / "final.py"), str(folder), *words])
    print(f"done: {name}, seed {seed}, {steps} steps", flush=True)


def on_one_thread(words: list[str]) -> None:
    """Run a Python script; ends this one with what it said where it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    if done.returncode:
        print(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
        os._exit(1)  # from a thread of the pool


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


def print_guards(finals: dict, curves: dict, out: Path, seeds: list[int]) -> None:
    """For each variant: how many seeds miss each guard, where the alarm rang, and the most common word of each seed."""
    print("\nseeds that miss a guard (docs/hacking.md), evaluations that rang the alarm, most common word by seed:")
    for name, found in finals.items():
        missed = [guards(each["before"], each["after"]) for each in found]
        cells = [f"{key.removeprefix('eval/')} {sum(one[key] is not None for one in missed)}" for key in GUARDS]
        rang = sum(bool(line.get("hacking/alarm")) for lines in curves[name] for line in lines)
        words = [common_word(folder_of(out, name, seed) / "final.jsonl") for seed in seeds]
        looks = sum(map(len, curves[name]))
        print(f"{name:<34}of {len(found)}: {'  '.join(cells)}  alarm {rang}/{looks}  {', '.join(words)}")


def common_word(path: Path) -> str:
    """The content word that the most completions of an evaluation hold."""
    rows = map(json.loads, path.read_text().splitlines())
    return next((row["top_word"] for row in rows if row["top_word"] is not None), "-")


def folder_of(out: Path, name: str, seed: int) -> Path:
    return out / name.replace(" ", "_") / str(seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    parser.add_argument("--set", choices=SETS, default="main")
    parser.add_argument("--only", nargs="+", help="variants of the set instead of all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=40, help="diffu-GRPO steps whose time each run gets")
    parser.add_argument("--judge", type=Path, default=Path("build/strong_judge"), help="written unless it is there")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out openings of the last evaluation")
    parser.add_argument("--evals", type=int, default=6, help="evaluations of a run beside the first")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each on one thread")
    args = parser.parse_args()
    chosen = {name: v for name, v in SETS[args.set].items() if args.only is None or name in args.only}
    args.out.mkdir(parents=True, exist_ok=True)
    args.judge = strong_judge(args.judge)
    timing = args.out / "seconds.json"
    seconds = json.loads(timing.read_text()) if timing.exists() else {}
    if missing := {name: v for name, v in chosen.items() if name not in seconds}:
        measured = seconds_per_step({REFERENCE: MAIN[REFERENCE], **missing}, args.rounds)
        # As ratios to the reference, which takes part each time: the machine may be faster another day.
        seconds |= {name: s / measured[REFERENCE] for name, s in measured.items()}
        timing.write_text(json.dumps(seconds, indent=2))
    steps = {name: max(args.evals, round(args.budget / seconds[name])) for name in chosen}
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, chosen, name, seed, steps[name], args) for seed in args.seeds for name in chosen]
        for job in jobs:
            job.result()
    curves, finals = {}, {}
    for name in chosen:
        folders = [folder_of(args.out, name, seed) for seed in args.seeds]
        logged = [read_metrics(folder / "metrics.jsonl") for folder in folders]
        curves[name] = [[line for line in lines if "eval/reward" in line] for lines in logged]
        finals[name] = [json.loads((folder / "final.json").read_text()) for folder in folders]
    print(f"\n{'variant':<34}{'step':>6}{'steps':>6}" + "".join(f"{n.removeprefix('eval/'):>15}" for n in NUMBERS))
    for name, found in finals.items():
        cells = ""
        for number in NUMBERS:
            mean, half = mean_and_half([each["after"][number] for each in found])
            cells += f"{mean:>8.2f} ± {half:<4.2f}"
        print(f"{name:<34}{seconds[name]:>6.2f}{steps[name]:>6}" + cells)
    starts = [each["before"] for found in finals.values() for each in found]
    cells = "".join(f"{statistics.mean(each[number] for each in starts):>8.2f}{'':<7}" for number in NUMBERS)
    print(f"{'before training':<34}{'':>6}{0:>6}" + cells)
    print_guards(finals, curves, args.out, args.seeds)
    if REFERENCE in curves:
        goals = [lines[-1]["eval/reward"] for lines in curves[REFERENCE]]
        print(f"\nshare of the budget to the final reward of {REFERENCE} (each seed's own):")
        for name, runs in curves.items():
            when = [reached(lines, goal) for lines, goal in zip(runs, goals, strict=True)]
            print(f"{name:<34}" + "  ".join("never" if x is None else f"{x:.2f}" for x in when))
    print("\nreward against KL to the base (mean over seeds), by evaluation:")
    for name, runs in curves.items():
        means = [
            [statistics.mean(x[i][key] for x in runs) for key in ("eval/kl", "eval/reward")]
            for i in range(min(map(len, runs)))
        ]
        print(f"{name:<34}" + "  ".join(f"{kl:.2f}:{reward:.2f}" for kl, reward in means))


if __name__ == "__main__":
    main()
