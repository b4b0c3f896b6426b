"""launch/: each Accelerate config starts real processes, slurm.sh requeues by itself, the rest is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from checkpoints import REPO
from processes import ENV, TRAIN, finish, free_port, launch_file, start
from training import adapter, saved, untimed, write

from rgrl.errors import ConfigError
from rgrl.runtime.launch import check_launch, left_out, shard_size

LAUNCH = REPO / "launch"
CONFIGS = {  # name -> (Accelerate's type, processes, what starts two processes of it on this machine)
    "cpu": ("MULTI_GPU", 2, []),
    "one_cpu": ("NO", 1, []),
    "one_gpu": ("NO", 1, []),
    "ddp": ("MULTI_GPU", 8, ["--num_processes", "2"]),
    "fsdp2": ("FSDP", 8, ["--num_processes", "2"]),
    "multi_node": ("MULTI_GPU", 16, None),
}
ACCELERATE = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def test_every_config_is_listed_and_loads_in_accelerate():
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == CONFIGS.keys()
    for name, (kind, processes, _) in CONFIGS.items():
        read = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
        assert (read.distributed_type.value, read.num_processes, read.mixed_precision) == (kind, processes, "no")
        check_launch({"ACCELERATE_MIXED_PRECISION": read.mixed_precision})


@pytest.mark.slow
def test_every_config_of_one_machine_trains_to_the_same_adapter(tiny, tmp_path):
    tiny["run"] |= {"steps": 2, "eval_steps": 0}
    left = {}
    for name, (_, _, words) in CONFIGS.items():
        if words is None:
            continue
        processes = 1 if name.startswith("one_") else 2
        tiny["run"] |= {"output_dir": str(tmp_path / name), "prompts_per_device": 4 // processes}
        finish(start(TRAIN, "--config", write(tiny, tmp_path), launcher=launch_file(name, *words)))
        left[name] = tmp_path / name
    assert adapter(left["cpu"], 2) == adapter(left["ddp"], 2) == adapter(left["fsdp2"], 2)
    two = untimed(left["cpu"])
    for one in (untimed(left["one_cpu"]), untimed(left["one_gpu"])):
        assert [line["num_tokens"] for line in one] == [line["num_tokens"] for line in two]
        for a, b in zip(one, two, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_shared_bfloat16_weights_train_a_float32_adapter_to_the_same_bytes(tiny, tmp_path):
    for section in ("model", "reward", "judge"):
        tiny[section]["dtype"] = "bfloat16"
    for name in ("cpu", "fsdp2"):
        tiny["run"]["output_dir"] = str(tmp_path / name)
        finish(start(TRAIN, "--config", write(tiny, tmp_path), launcher=launch_file(name, "--num_processes", "2")))
    assert adapter(tmp_path / "cpu", 2) == adapter(tmp_path / "fsdp2", 2) != adapter(tmp_path / "cpu", 1)
    assert untimed(tmp_path / "cpu") == untimed(tmp_path / "fsdp2")


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "`model.dtype`"),
        (ACCELERATE | {"FSDP_VERSION": "1"}, "`fsdp_version: 2`"),
        (ACCELERATE | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "launch/ddp.yaml"),
        (ACCELERATE | {"FSDP_OFFLOAD_PARAMS": "true"}, "`fsdp_offload_params: true`"),
        (ACCELERATE | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "`run.gradient_checkpointing`"),
        (ACCELERATE | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "without weights"),
    ],
)
def test_launch_settings_that_are_not_supported_are_refused(environ, message):
    check_launch(ACCELERATE | {"ACCELERATE_MIXED_PRECISION": "no"})
    with pytest.raises(ConfigError, match=message):
        check_launch(environ)


def test_weights_are_shared_within_a_machine():
    assert shard_size({"LOCAL_WORLD_SIZE": "8"}, 8) == 1
    assert shard_size(ACCELERATE | {"LOCAL_WORLD_SIZE": "8"}, 32) == 8
    with pytest.raises(ConfigError, match="there is one"):
        shard_size(ACCELERATE, 1)
    with pytest.raises(ConfigError, match="equally many"):
        shard_size(ACCELERATE | {"LOCAL_WORLD_SIZE": "3"}, 4)


@pytest.mark.parametrize(
    ("environ", "joined", "asked"),
    [
        ({}, 1, None),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 2, None),
        ({"MASTER_PORT": "1"}, 1, None),  # some cluster's profile
        ({"MASTER_PORT": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 1, "launch/cpu.yaml"),
        ({"SLURM_NTASKS": "8"}, 8, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16"}, 16, None),  # a launcher on each of two machines
        ({"SLURM_NTASKS": "8"}, 1, "SLURM_NTASKS is 8"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1, "OMPI_COMM_WORLD_SIZE is 4"),
    ],
)
def test_processes_that_were_asked_for_and_did_not_join_are_noticed(environ, joined, asked):
    warning = left_out(environ, joined)
    assert warning is None if asked is None else asked in warning


# ---------------------------------------------------------------------------------------------------------- Slurm

# Slurm's two commands as far as slurm.sh uses them, for one machine. The tasks are real processes.
SRUN = """#!/usr/bin/env python3
import os, subprocess, sys
assert sys.argv[1] == "--kill-on-bad-exit=0"
tasks = [
    subprocess.Popen(sys.argv[2:], env=os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
    for i in range(int(os.environ["SLURM_NTASKS"]))
]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
if [ "$1 $2" = "show hostnames" ]; then echo localhost; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a job of two tasks on one machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    own = {"MASTER_PORT": free_port(), "SCONTROL_LOG": str(tmp_path / "scontrol.log"), "OUTPUT_DIR": "out"}
    return ENV | slurm | own | {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def submit(environ: dict[str, str], *words: str, code: int = 0) -> str:
    done = subprocess.run(
        ["bash", "launch/slurm.sh", *words], cwd=REPO, env=environ, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_slurm_job_that_was_stopped_is_queued_again_and_resumes(tiny, tmp_path, cluster):
    tiny["reward"]["functions"] = {"processes:leave_at_call": 0.5}
    tiny["run"] |= {"steps": 4, "save_steps": 1, "eval_steps": 0}
    cluster["CONFIG"] = str(write(tiny, tmp_path))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    submit(cluster | {"OUTPUT_DIR": str(whole)})
    assert not (tmp_path / "scontrol.log").exists()
    submit(cluster | {"OUTPUT_DIR": str(broken), "LEAVE_AT": "3"}, code=75)
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n" and saved(broken) == ["step_000001", "step_000002"]
    submit(cluster | {"OUTPUT_DIR": str(broken), "SHARE_WEIGHTS": "true"}, "--run.keep_checkpoints", "4")
    assert len(saved(broken)) == 4, "words after the script go to the run"
    assert adapter(broken, 4) == adapter(whole, 4) and untimed(broken) == untimed(whole)


def test_a_slurm_job_without_a_recipe_says_so(cluster):
    assert "set CONFIG to a recipe" in submit(cluster, code=1)
