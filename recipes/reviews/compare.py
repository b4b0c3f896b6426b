"""Compare ways of training on the reviews recipe at equal wall clock: seeds, intervals, curves.

    python recipes/reviews/compare.py --out runs/compare
    python recipes/reviews/compare.py --out runs/compare --set gradient --only diffu_grpo rgrl --seeds 0 1 2 3 4
    python recipes/reviews/compare.py --out runs/bridge --set bridge

Steps cost more or less, so first a step of each variant is timed, all of them in turn: in processor seconds of one
thread, which are its wall clock where nothing else runs. Each then gets as many steps as fit into the time of
`--budget` diffu-GRPO steps, evaluations not counted. At its end a run is evaluated as `final.py` does: 256 held-out
openings, the strong judge, the ridge judge, and the guards against the same before training. A comparison that was
stopped goes on: complete runs are kept, others resumed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import summary
import torch
from accelerate import Accelerator
from final import PROMPTS, strong_judge
from summary import folder_of
from variants import MAIN, REFERENCE, SETS, Variants

from rgrl.config import load_config
from rgrl.data import PromptStream
from rgrl.metrics import Clock
from rgrl.setup import set_up
from rgrl.step import rollout_step, update_step
from rgrl.tracking import read_metrics

HERE = Path(__file__).parent


def words_of(variants: Variants, name: str) -> list[str]:
    recipe, overrides = variants[name]
    return [str(HERE / f"{recipe}.yaml"), *overrides]


def seconds_per_step(variants: Variants, rounds: int) -> dict[str, float]:
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
            at = one.config.run.steps // 2
            scored = rollout_step(one, stream.batch(at, one.accelerator.process_index), at, Clock())
            update_step(one, scored, 0, 0, Clock())
            if round_ > 0:  # the first round warms up
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def run(variants: Variants, name: str, seed: int, steps: int, args: argparse.Namespace) -> None:
    """Train one variant with one seed, and evaluate what came out, on one thread."""
    folder = folder_of(args.out, name, seed)
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines or lines[-1]["step"] != steps:
        path, *overrides = words_of(variants, name)
        words = ["--config", path, *overrides, "--run.seed", str(seed), "--run.steps", str(steps)]
        words += ["--data.eval_prompts", "64", "--run.eval_steps", str(max(1, steps // args.evals))]
        words += ["--run.save_steps", str(max(1, steps // 4))]
        words += ["--judge.path", str(args.judge), "--tracking.wandb", "false", "--tracking.completions_steps", "0"]
        words += ["--guidance.probe_prompts", "0", "--run.output_dir", str(folder)]
        words += ["--run.keep_checkpoints", "1", "--run.resume_from_checkpoint", "auto"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    parser.add_argument("--set", choices=SETS, default="main")
    parser.add_argument("--only", nargs="+", help="variants of the set instead of all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=24, help="diffu-GRPO steps whose time each run gets")
    parser.add_argument("--judge", type=Path, default=Path("build/strong_judge"), help="written unless it is there")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out openings of the last evaluation")
    parser.add_argument("--evals", type=int, default=6, help="evaluations of a run beside the first")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--samples", type=int, default=0, help="completions of each variant to print")
    parser.add_argument("--picture", type=Path, help="draw the curves here")
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
    results = summary.collect(args.out, list(chosen), args.seeds, steps, seconds)
    summary.print_ends(results)
    summary.print_guards(results)
    summary.print_against(results, REFERENCE if REFERENCE in chosen else next(iter(chosen)))
    summary.print_curves(results)
    summary.print_samples(results, args.samples)
    if args.picture is not None:
        summary.draw(results, args.picture)


if __name__ == "__main__":
    main()
