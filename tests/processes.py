"""Runs of recipes/train.py in processes of their own, for the tests that kill, resume and launch them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import pyarrow.parquet as pq
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import save_file

from rgrl.tracking import TIMING, read_metrics

TESTS = Path(__file__).parent
TRAIN = TESTS.parent / "recipes" / "train.py"
_PATH = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))  # so that a run finds `die_at_call`
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _PATH}
LAUNCH = ["-m", "accelerate.commands.launch"]
PAIR = [*LAUNCH, "--config_file", str(TESTS.parent / "launch" / "cpu.yaml")]

_calls = 0


def die_at_call(prompts, completions, rows):
    """A reward that takes its process away, as a power cut would, at the call and on the rank of the environment.

    It draws from the global generators, as anybody's own reward may: their state is part of a checkpoint.
    """
    global _calls
    _calls += 1
    if f"{os.environ.get('RANK', 0)}:{_calls}" == os.environ.get("DIE_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.1 * len(text) + float(torch.rand(()) + random.random() + numpy.random.rand()) for text in completions]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def leave_at_call(prompts, completions, rows):
    """A reward that asks its own process to stop, as a scheduler would, at the call of the environment."""
    global _calls
    _calls += 1
    if str(_calls) == os.environ.get("LEAVE_AT"):
        os.kill(os.getpid(), signal.SIGUSR1)
    return [0.1 * len(text) for text in completions]


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return [start(script, *words, **ranks, RANK=str(r), LOCAL_RANK=str(r), **more) for r in range(count)]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What the process printed; it must end with `code`."""
    try:
        out, err = process.communicate(timeout=170)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it launched
        raise
    assert process.returncode == code, err[-3000:]
    return out + err


def leave(accelerator: Accelerator, folder: Path, tensors: dict[str, torch.Tensor], told: dict) -> None:
    """What a rank of a launched script has to tell, in `folder`; then it ends."""
    path = folder / f"rank_{accelerator.process_index}"
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(told))
    accelerator.end_training()


def write(config: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def adapter(output: Path, step: int) -> bytes:
    return (output / "checkpoints" / f"step_{step:06d}" / "adapter" / "adapter_model.safetensors").read_bytes()


def saved(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("step_*"))


def untimed(output: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what no two runs share."""
    lines = read_metrics(output / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(TIMING)} for line in lines]


def tables(output: Path) -> dict[str, list[dict]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((output / "completions").iterdir())}
