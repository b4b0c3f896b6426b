"""Runs of recipes/train.py in processes of their own, for the tests that kill, resume and launch them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch
import trials
from accelerate import Accelerator
from checkpoints import REPO
from safetensors.torch import load_file, save_file

TRAIN = REPO / "recipes" / "train.py"
HELPERS = Path(__file__).parent
# So that a run finds `processes:die_at_call` and `kills:reward`.
_PATH = os.pathsep.join(filter(None, [str(HELPERS), str(HELPERS.parent), os.environ.get("PYTHONPATH")]))
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _PATH}
LAUNCH = ["-m", "accelerate.commands.launch"]


def launch_file(name: str, *words: str) -> list[str]:
    """Words for Accelerate's launcher: a file of launch/ and what changes it."""
    return ["--config_file", str(REPO / "launch" / f"{name}.yaml"), *words]


PAIR = [*LAUNCH, *launch_file("cpu")]
FSDP2 = launch_file("fsdp2", "--num_processes", "2")

_calls = 0


def die_at_call(prompts, completions, rows):
    """A reward that kills its process, as a power cut would, at the call and on the rank that DIE_AT names.

    It draws from the global generators, as any user's reward may: their state is part of a checkpoint.
    """
    global _calls
    _calls += not trials.scored(completions)
    if f"{os.environ.get('RANK', 0)}:{_calls}" == os.environ.get("DIE_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.1 * len(text) + float(torch.rand(()) + random.random() + numpy.random.rand()) for text in completions]


def leave_at_call(prompts, completions, rows):
    """A reward that asks its own process to stop, as a scheduler would, at the call that LEAVE_AT names."""
    global _calls
    _calls += not trials.scored(completions)
    if str(_calls) == os.environ.get("LEAVE_AT"):
        os.kill(os.getpid(), signal.SIGUSR1)
    return [0.1 * len(text) for text in completions]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(
    script: Path,
    *words: str | Path,
    processes: int = 1,
    launcher: Sequence[str] = (),
    env: dict | None = None,
    **more: str,
):
    """The process that runs `script` on one rank, or launches it on two, or as `launcher` says. Its stdin is closed."""
    launcher = [*LAUNCH, *launcher] if launcher else PAIR if processes == 2 else []
    backend = {"ACCELERATE_USE_CPU": "true"} if launcher and torch.cuda.is_available() else {}
    return subprocess.Popen(
        ["sh", "-c", 'exec "$0" "$@" <&-', sys.executable, *launcher, str(script), *map(str, words)],
        env=(env or ENV) | backend | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_ranks(count: int, script: Path, *words: str | Path, **more: str) -> list[subprocess.Popen]:
    """The ranks of one run without a launcher, which would end them all when one has died."""
    if count == 1:
        return [start(script, *words, **more)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = {"WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"} | address
    return [start(script, *words, **ranks, RANK=str(r), LOCAL_RANK=str(r), **more) for r in range(count)]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What the process printed; it must end with `code`."""
    try:
        out, err = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it launched
        raise
    assert process.returncode == code, err[-3000:]
    return out + err


def wait_until(holds: Callable[[], bool], seconds: float = 150.0) -> None:
    """Return once the condition holds. The limit only keeps a broken test from hanging."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def altered_train(folder: Path, *lines: str) -> Path:
    """A script in `folder` that runs these lines of Python and then recipes/train.py."""
    script = folder / "altered_train.py"
    run = f"sys.argv[0] = {str(TRAIN)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    script.write_text("\n".join(["import runpy, sys", *lines, run]))
    return script


def leave(accelerator: Accelerator, folder: Path, tensors: dict[str, torch.Tensor], told: dict) -> None:
    """Write what a rank of a launched script reports to `folder`, and end the rank."""
    path = folder / f"rank_{accelerator.process_index}"
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(told))
    accelerator.end_training()


def left_by(folder: Path, ranks: int) -> list[tuple[dict[str, torch.Tensor], dict]]:
    """What each rank wrote with `leave`."""
    paths = [folder / f"rank_{rank}" for rank in range(ranks)]
    return [(load_file(f"{path}.safetensors"), json.loads(Path(f"{path}.json").read_text())) for path in paths]
