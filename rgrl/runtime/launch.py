"""Processes: join those that were started together, and check what the launcher asked for."""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs

from rgrl.config import Config
from rgrl.console import warn
from rgrl.environment import check_numbers
from rgrl.errors import ConfigError, RunStoppedError

_YES = ("1", "true", "yes", "on")


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in _YES


def check_launch(environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` for launch settings that would be ignored or are not supported.

    `environ` is the environment that `accelerate launch` made.
    """
    sharded = _is_on(environ, "ACCELERATE_USE_FSDP")
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    rules = [
        (
            not _is_on(environ, "ACCELERATE_USE_DEEPSPEED"),
            "DeepSpeed is not supported: launch/fsdp2.yaml shards the frozen weights as ZeRO-3 would (docs/scaling.md)",
        ),
        (not _is_on(environ, "ACCELERATE_USE_MEGATRON_LM"), "Megatron-LM is not supported: use launch/fsdp2.yaml"),
        (
            precision in ("no", "none", ""),
            f"`mixed_precision: {precision}` of the launch config is not supported: leave it 'no' and set "
            "`model.dtype`",
        ),
        (
            not sharded or environ.get("FSDP_VERSION") == "2",
            f"FSDP version {environ.get('FSDP_VERSION', '1')} is not supported: set `fsdp_version: 2`",
        ),
        (
            not sharded or environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in (*_YES, "full_shard"),
            "`fsdp_reshard_after_forward: false` would keep every weight on every process: set it true, or use "
            "launch/ddp.yaml",
        ),
        (
            not sharded or not _is_on(environ, "FSDP_OFFLOAD_PARAMS"),
            "`fsdp_offload_params: true` is not supported: set it false",
        ),
        (
            not sharded or not _is_on(environ, "FSDP_ACTIVATION_CHECKPOINTING"),
            "`fsdp_activation_checkpointing` is not supported: leave it false and set `run.gradient_checkpointing`",
        ),
        (
            not sharded or not _is_on(environ, "FSDP_CPU_RAM_EFFICIENT_LOADING"),
            "`fsdp_cpu_ram_efficient_loading: true` would leave all processes but one without weights: set it false",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def shard_size(environ: Mapping[str, str], processes: int) -> int:
    """How many neighbouring processes share one copy of the frozen weights: those of a machine; 1 without FSDP.

    Raises `ConfigError` if machines have different numbers of processes, or one each.
    """
    if not _is_on(environ, "ACCELERATE_USE_FSDP"):
        return 1
    size = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if size < 2:
        raise ConfigError("FSDP shares weights among the processes of a machine and there is one: use launch/ddp.yaml")
    if processes % size:
        raise ConfigError(f"FSDP needs equally many processes on each machine: {size} of {processes} run here")
    return size


def join_processes(config: Config) -> Accelerator:
    """Initialise the process group, over gloo where there is no GPU.

    Raises `ConfigError` for a launch that cannot work, such as processes that would not know of each other: each would
    be a main process writing to the same folder.
    """
    check_numbers(os.environ)
    check_launch(os.environ)
    # Groups are created behind a timed barrier: NCCL has no time limit where a process dies before their first use.
    os.environ.setdefault("TORCH_DIST_INIT_BARRIER", "1")
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=config.run.timeout_minutes))
    # Accelerate's launcher starts several CPU processes only as if they were for GPUs, and doesn't tell them.
    on_cpus = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(cpu=on_cpus, kwargs_handlers=[patience])
    except (ValueError, torch.distributed.DistError) as error:
        told = " ".join(str(error).split())
        if "timed out" in told.lower():  # others are slow, or dead: nothing that other settings would mend
            raise RunStoppedError(f"the processes did not all join: {told[:300]}", on_one_rank=True) from error
        # A variable that is missing, or a port in use.
        raise ConfigError(f"the processes cannot join as the launcher says: {told[:300]}", on_one_rank=True) from error
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started but Accelerate joined {accelerator.num_processes}: without GPUs, set "
            "ACCELERATE_USE_CPU=true"
        )
    if accelerator.is_main_process and (problem := left_out(os.environ, started)) is not None:
        warn(problem)
    return accelerator


def left_out(environ: Mapping[str, str], joined: int) -> str | None:
    """A warning where more processes seem to have been asked for than joined; None otherwise."""
    # Accelerate's launcher names a meeting place for as many as were asked for; without GPUs it then starts only one.
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ
    if by_accelerate and "WORLD_SIZE" not in environ and joined == 1:
        return (
            "`accelerate launch` was asked for several processes and has started one: on CPUs it starts several only "
            "with --config_file launch/cpu.yaml"
        )
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        asked = environ.get(name, "")
        if asked.isascii() and asked.isdecimal() and len(asked) < 10 and int(asked) > joined:
            return f"{name} is {asked}, but this run has {joined}: processes join by WORLD_SIZE, as in launch/slurm.sh"
    return None


def is_main_process() -> bool:
    """Whether this is the process that prints and writes. Only after `join_processes`."""
    return PartialState().is_main_process
