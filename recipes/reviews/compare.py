"""Compare ways of training on the reviews recipe at equal wall clock: seeds, intervals, curves.

    python recipes/reviews/compare.py --out runs/compare
    python recipes/reviews/compare.py --out runs/compare --set ablation --seeds 0 1
    python recipes/reviews/compare.py --out runs/bridge --set bridge

Steps cost more or less, so first a step of each variant is timed, all of them in turn: in processor seconds of one
thread, which are its wall clock where nothing else runs. Each then gets as many steps as fit into the time of
`--budget` diffu-GRPO steps, evaluations not counted. Complete runs are kept.
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

from rgrl.config import load_config
from rgrl.data import PromptStream
from rgrl.runtime.clock import Clock
from rgrl.setup import set_up
from rgrl.step import rollout_step, update_step
from rgrl.tracking import read_metrics
from rgrl.tracking.report import GUARDS, counted_word, guards

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
SETS = {"main": MAIN, "ablation": ABLATION, "bridge": BRIDGE}
NUMBERS = ("eval/reward", "eval/judge", "eval/distinct_1", "eval/distinct_2", "eval/top_word", "eval/length")
NUMBERS += ("eval/empty", "eval/base_nll", "eval/kl")
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


def run(variants: dict, name: str, seed: int, steps: int, evals: int, folder: Path) -> None:
    """Train one variant with one seed, on one thread."""
    lines = read_metrics(folder / "metrics.jsonl")
    if lines and lines[-1]["step"] == steps:
        return
    path, *overrides = words_of(variants, name)
    every = str(max(1, steps // evals))
    words = [sys.executable, str(HERE.parent / "train.py"), "--config", path, *overrides, "--run.seed", str(seed)]
    words += [
        "--run.steps",
        str(steps),
        "--run.eval_steps",
        every,
        "--run.save_steps",
        "0",
        "--tracking.wandb",
        "false",
    ]
    words += ["--guidance.probe_prompts", "0", "--tracking.completions_steps", "0", "--run.output_dir", str(folder)]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}, seed {seed}: exit code {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
        sys.exit(1)
    print(f"done: {name}, seed {seed}, {steps} steps", flush=True)


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


def print_guards(out: Path, curves: dict, seeds: list[int]) -> None:
    """For each variant: how many seeds miss each guard, where the alarm rang, and the most common word of each seed."""
    print("\nseeds that miss a guard (docs/hacking.md), evaluations that rang the alarm, most common word by seed:")
    for name, runs in curves.items():
        found = [guards(lines[0], lines[-1]) for lines in runs]
        # A run from before a guard was measured counts for nothing, and is told.
        cells = []
        for key in GUARDS:
            known = [each[key] is not None for each in found if key in each]
            cells.append(f"{key.removeprefix('eval/')} {sum(known)}/{len(known)}")
        rang = sum(bool(line.get("hacking/alarm")) for lines in runs for line in lines)
        folders = [out / name.replace(" ", "_") / str(seed) for seed in seeds]
        words = [counted_word(folder, lines[-1]["step"]) or "-" for folder, lines in zip(folders, runs, strict=True)]
        print(f"{name:<34}" + "  ".join(cells) + f"  alarm {rang}/{sum(map(len, runs))}  {', '.join(words)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    parser.add_argument("--set", choices=SETS, default="main")
    parser.add_argument("--only", nargs="+", help="variants of the set instead of all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=60, help="diffu-GRPO steps whose time each run gets")
    parser.add_argument("--evals", type=int, default=6, help="evaluations of a run beside the first")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each on one thread")
    args = parser.parse_args()
    chosen = {name: v for name, v in SETS[args.set].items() if args.only is None or name in args.only}
    args.out.mkdir(parents=True, exist_ok=True)
    timing = args.out / "seconds.json"
    seconds = json.loads(timing.read_text()) if timing.exists() else {}
    if missing := {name: v for name, v in chosen.items() if name not in seconds}:
        measured = seconds_per_step({REFERENCE: MAIN[REFERENCE], **missing}, args.rounds)
        # As ratios to the reference, which takes part each time: the machine may be faster another day.
        seconds |= {name: s / measured[REFERENCE] for name, s in measured.items()}
        timing.write_text(json.dumps(seconds, indent=2))
    steps = {name: max(args.evals, round(args.budget / seconds[name])) for name in chosen}
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(run, chosen, name, seed, steps[name], args.evals, args.out / name.replace(" ", "_") / str(seed))
            for seed in args.seeds
            for name in chosen
        ]
        for job in jobs:
            job.result()
    curves = {
        name: [
            [
                x
                for x in read_metrics(args.out / name.replace(" ", "_") / str(seed) / "metrics.jsonl")
                if "eval/reward" in x
            ]
            for seed in args.seeds
        ]
        for name in chosen
    }
    print(f"\n{'variant':<34}{'step':>6}{'steps':>6}" + "".join(f"{n.removeprefix('eval/'):>15}" for n in NUMBERS))
    for name, runs in curves.items():
        cells = ""
        for number in NUMBERS:
            mean, half = mean_and_half([lines[-1].get(number, float("nan")) for lines in runs])
            cells += f"{mean:>8.2f} ± {half:<4.2f}"
        print(f"{name:<34}{seconds[name]:>6.2f}{steps[name]:>6}" + cells)
    print_guards(args.out, curves, args.seeds)
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
