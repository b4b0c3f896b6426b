"""Rollouts per second by number of processes, one CPU thread each.

    python recipes/scaling.py --config recipes/reviews/rgrl.yaml --processes 1 2

Every process rolls out and scores its `run.prompts_per_device` prompts a step, as in training, and the processes meet
after each step. The numbers of processes take turns within a round, so that whatever else the machine does falls on
all of them; a ratio is the median over rounds of a number's rate by the first number's rate in the same round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from rgrl.config import ConfigError, load_config
from rgrl.metrics import Clock
from rgrl.runtime.launch import join_processes
from rgrl.setup import set_up
from rgrl.step import rollout_step

LAUNCH = Path(__file__).parent.parent / "launch"


def work(config_path: str, steps: int) -> None:
    """One of the launched processes; the main one prints the rate of all together."""
    config = load_config(config_path, ["--run.eval_steps", "0"])
    accelerator = join_processes(config)
    run = set_up(config, accelerator)
    rollout_step(run, run.prompts(0), 0, Clock())  # warm-up: what happens once is not counted
    accelerator.wait_for_everyone()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        rollout_step(run, run.prompts(step), step, Clock())
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - start
    rows = steps * config.run.prompts_per_device * config.rollout.num_generations * accelerator.num_processes
    if accelerator.is_main_process:
        print(json.dumps({"processes": accelerator.num_processes, "rows_per_second": rows / seconds}))
    accelerator.end_training()


def rate(config: str, launch: str, processes: int, steps: int) -> float:
    """Rows per second of `processes` processes. Raises `ConfigError` with what they said where they fail."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch]
    command += ["--num_processes", str(processes), __file__, "--config", config, "--steps", str(steps), "--worker"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("error:")] or [done.stderr[-500:]]
        raise ConfigError(f"{processes} processes failed: {reasons[0].removeprefix('error: ')}")
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["processes"] == processes
    return told["rows_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with the settings")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=4, help="rollouts a process is timed over")
    parser.add_argument("--rounds", type=int, default=3)
    default = LAUNCH / ("ddp.yaml" if torch.cuda.is_available() else "cpu.yaml")
    parser.add_argument("--launch", default=str(default), help="Accelerate config (default: ddp.yaml or cpu.yaml)")
    parser.add_argument(
        "--require", type=float, metavar="RATIO", help="exit 1 if the last number's ratio is below this"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if min([*args.processes, args.steps, args.rounds]) < 1:
            raise ConfigError("--processes, --steps and --rounds must be 1 or more")
        if args.worker:
            work(args.config, args.steps)
            return
        rates: dict[int, list[float]] = {n: [] for n in args.processes}
        for _ in range(args.rounds):
            for n, seen in rates.items():
                seen.append(rate(args.config, args.launch, n, args.steps))
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{'processes':>9}{'rows/s':>9}{'ratio':>8}   ratio in each round")
    for n, seen in rates.items():
        ratios = [a / b for a, b in zip(seen, rates[args.processes[0]], strict=True)]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{n:>9}{statistics.median(seen):>9.2f}{statistics.median(ratios):>8.2f}   {each}")
    if args.require and statistics.median(ratios) < args.require:
        print(f"error: the ratio is below {args.require}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
