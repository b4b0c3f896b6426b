"""Kill one run again and again with SIGKILL, at random moments, and compare its end with that of an undisturbed run.

    python tests/kills.py --kills 50 --processes 2

A run of many short steps, saved every other one and evaluated now and then, is started with
`--run.resume_from_checkpoint auto`, killed, and started again. A kill falls anywhere between the first import and two
steps after the last checkpoint; every third one waits for a save. Of two ranks either both are killed at once, or one,
and then the other must end by itself. After each kill, everything named as a checkpoint is whole, and the newest one is
no older than before. At the end, adapter, metrics (timings aside) and tables are the same.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))  # as a command; pytest knows it from setup.cfg

import trials
from checkpoints import PROMPTS, write_dream, write_reward
from processes import ENV, TRAIN, start_ranks
from training import assert_same_run, saved, untimed, write

from rgrl.algo.objectives import OBJECTIVES, Objective
from rgrl.checkpoint import checkpoints, damage
from rgrl.tracking import read_metrics


def mark(what: str) -> None:
    """Leave a trace of where this run is, for the process that kills it."""
    if os.environ.get("RANK", "0") == "0" and "MARKS" in os.environ:
        with open(os.environ["MARKS"], "a") as handle:
            handle.write(what)


def reward(prompts, completions, rows):
    if not trials.scored(completions):
        mark("r")
    return [0.1 * len(text) + random.random() for text in completions]


def _marked(inputs, config):
    if not trials.updated(inputs):
        mark("u")
    return OBJECTIVES["reinforce"].loss(inputs, config)


objective = Objective(_marked)


def settings(folder: Path, steps: int, processes: int) -> Path:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    # The timeout is for a rank that waits for one that was killed before they met.
    run = {"steps": steps, "save_steps": 2, "eval_steps": 7, "timeout_minutes": 0.5, "output_dir": "set below"}
    tree = {
        "model": {"path": str(write_dream(folder / "dream"))},
        "lora": {"r": 4, "dropout": 0.1},
        "data": {"path": str(prompts), "eval_path": str(prompts), "max_prompt_length": 16},
        "reward": {"path": str(write_reward(folder / "reward")), "functions": {"kills:reward": 0.5}},
        "rollout": {"num_generations": 2, "max_completion_length": 8, "steps": 4},
        "objective": {"name": "kills:objective", "beta": 0.01},
        "optim": {"learning_rate": 1e-3, "schedule": "linear"},
        "run": run | {"prompts_per_device": 2 // processes},
        "tracking": {"wandb": False, "completions_steps": 5},
    }
    return write(tree, folder)


def end(ranks: list[subprocess.Popen], patience: float) -> list[str]:
    """What each rank printed by its end, which must come within `patience` seconds."""
    return [rank.communicate(timeout=patience)[1] for rank in ranks]


def complete(processes: int, *words: object) -> None:
    """Let a run come to its end."""
    ranks = start_ranks(processes, TRAIN, *words)
    for rank, text in zip(ranks, end(ranks, 600), strict=True):
        assert rank.returncode == 0, text[-2000:]
        assert "damaged" not in text


def unfinished(output: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or that a kill left behind; the next save clears those away."""
    found = set()
    for path in (output / "checkpoints").glob(".partial_*"):
        try:
            found.add((path.name, path.stat().st_ino))
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def phase(output: Path, marks: Path, lines_before: int, leftovers: set[tuple[str, int]]) -> str:
    """Where the run was when it was killed."""
    if unfinished(output) - leftovers:
        return "save"
    trace = marks.read_text() if marks.exists() else ""
    if not trace:
        return "start"
    new = len(read_metrics(output / "metrics.jsonl")) - lines_before
    if trace[-1] == "r":
        return "reward"
    return "update" if trace.count("u") > new else "rollout"


def resuming(config: Path, output: Path) -> tuple[object, ...]:
    return "--config", config, "--run.output_dir", output, "--run.resume_from_checkpoint", "auto"


def kill_once(
    config: Path, output: Path, marks: Path, processes: int, draw: random.Random, save: bool, step_time: float
) -> str:
    """Start the run, kill it at some moment, and say where that was; "done" if it came to its end before."""
    marks.unlink(missing_ok=True)
    leftovers = unfinished(output)
    ranks = start_ranks(processes, TRAIN, *resuming(config, output), MARKS=str(marks))
    early = time.monotonic() + draw.uniform(0, 6) if draw.random() < 0.1 else float("inf")
    steps, lines = draw.randint(1, 4), -1  # `lines` of the run as it resumed; older ones are dropped when it starts
    while all(rank.poll() is None for rank in ranks):
        time.sleep(0.001)
        if time.monotonic() > early:
            break
        if not marks.exists():
            continue
        now = len(read_metrics(output / "metrics.jsonl"))
        lines = now if lines < 0 else lines
        if now < lines + steps or (save and not unfinished(output) - leftovers):
            continue
        time.sleep(draw.uniform(0, 0.015 if save else 1.5 * step_time))
        break
    victims = ranks if draw.random() < 0.5 else [draw.choice(ranks)]
    done = all(rank.poll() == 0 for rank in ranks)
    for victim in victims:
        if victim.poll() is None:
            os.kill(victim.pid, signal.SIGKILL)
    printed = end(ranks, 120)
    if done:
        return "done"
    for rank, text in zip(ranks, printed, strict=True):
        if rank.returncode == 0 and processes == 1:
            return "done"
        if rank not in victims and rank.returncode == 2:
            raise AssertionError(f"a run that was only killed was refused: {text[-2000:]}")
    return phase(output, marks, max(lines, 0), leftovers)


def run(kills: int, processes: int, seed: int, folder: Path) -> Counter:
    """Kill and compare in `folder`; returns how many kills fell into which phase. Raises `AssertionError`."""
    draw = random.Random(seed)
    steps = 10 + 3 * kills
    config = settings(folder, steps, processes)
    whole, broken = folder / "whole", folder / "broken"
    complete(processes, "--config", config, "--run.output_dir", whole)
    times = [line["step_time"] for line in read_metrics(whole / "metrics.jsonl")[1:]]
    where: Counter = Counter()
    newest = -1
    for i in range(kills):
        what = kill_once(config, broken, folder / "marks", processes, draw, i % 3 == 2, statistics.median(times))
        assert what != "done", f"the run was over after {i} kills: give it more steps"
        where[what] += 1
        found = checkpoints(broken)
        assert not [problem for problem in map(damage, found) if problem], "a checkpoint is named but not whole"
        reached = int(found[-1].name.removeprefix("step_")) if found else -1
        assert reached >= newest, f"the checkpoint of step {newest} is lost"
        newest = reached
        print(f"kill {i + 1} of {kills} in {what}; newest checkpoint {newest}", flush=True)
    complete(processes, *resuming(config, broken))
    assert_same_run(broken, whole, steps)
    assert [line["step"] for line in untimed(whole)] == list(range(steps + 1))
    assert saved(broken) == saved(whole)
    return where


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args()
    assert ENV["OMP_NUM_THREADS"] == "1"
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        where = run(known.kills, known.processes, known.seed, Path(name))
    told = ", ".join(f"{count} in {what}" for what, count in where.most_common())
    print(f"{known.kills} kills, {known.processes} process(es), {time.monotonic() - began:.0f} s: {told}; all the same")
    sys.exit(0)
