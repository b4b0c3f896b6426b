"""A reward and an objective, named by dotted path, in whose calls a test makes things go wrong."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import trials

from rgrl.algo.objectives import OBJECTIVES, Objective
from rgrl.types import LossOutputs

in_reward: dict[int, Callable[[], object]] = {}  # number of the call, from 1 -> what happens in it
in_loss: dict[int, Callable[[], float | None]] = {}  # the same; if it returns a number, that is added to the loss
calls = {"reward": 0, "loss": 0}


def reset() -> None:
    in_reward.clear()
    in_loss.clear()
    calls.update(reward=0, loss=0)
    # For a run in its own process: "PLACE:CALL:RANK:DEED", such as "loss:3:1:SIGSTOP".
    if "FAULT" in os.environ:
        place, call, rank, deed = os.environ["FAULT"].split(":")
        if rank == os.environ.get("RANK", "0"):
            {"reward": in_reward, "loss": in_loss}[place][int(call)] = DEEDS[deed]


def hang_in_c() -> None:
    """Nothing in Python can interrupt this."""
    sum(iter(int, 1))


def fail() -> None:
    raise ZeroDivisionError("this rank has had it")


def kill_wandb() -> None:
    found = subprocess.run(["pgrep", "-f", f"wandb-core.*--pid {os.getpid()}"], capture_output=True, text=True)
    assert found.stdout.split(), "no process of W&B to kill"
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.5)


def wait_for_a_signal() -> None:
    """Say in the file WAITING that this process waits, and go on once one of its handlers has been called."""
    called: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    for number in handlers:
        signal.signal(number, lambda number, frame: (handlers[number](number, frame), called.append(number)))
    Path(os.environ["WAITING"]).touch()
    while not called:
        time.sleep(0.01)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def leave_children() -> None:
    """Leave a forked child and one of a shell behind, name them in the run's folder, and die."""
    forked = os.fork()
    if not forked:
        for number in (1, 2):  # pipes of who waits for their end
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        time.sleep(600)
        os._exit(0)
    started = subprocess.Popen(
        ["sleep", "600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder = Path(sys.argv[sys.argv.index("--config") + 1]).parent / "run"
    (folder / "children").write_text(f"{forked} {started.pid}")
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(times: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # for Python to call the handler


DEEDS: dict[str, Callable[[], object]] = {
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "fail": fail,
    "hang": hang_in_c,
    "kill_wandb": kill_wandb,
    "leave_children": leave_children,
    "SIGINT": lambda: interrupt(1),
    "SIGINT_twice": lambda: interrupt(2),
    "wait": wait_for_a_signal,
}


def reward(prompts, completions, rows):
    if not trials.scored(completions):
        calls["reward"] += 1
        in_reward.get(calls["reward"], lambda: None)()
    return [0.1 * len(text) for text in completions]


def _loss(inputs, config):
    out = OBJECTIVES["reinforce"].loss(inputs, config)
    if trials.updated(inputs):
        return out
    calls["loss"] += 1
    extra = in_loss.get(calls["loss"], lambda: None)()
    if extra is None:
        return out
    return LossOutputs(out.loss_sum + torch.tensor(extra), out.denominator, out.metrics)


objective = Objective(_loss)
reset()
