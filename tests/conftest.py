"""Fixtures: tiny checkpoints, written once per session, and the settings of a whole run at that size."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from checkpoints import PROMPTS, write_dream, write_llada, write_reward

from rgrl.models import Policy, load_policy

os.environ["WANDB_MODE"] = "offline"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
# A shell's background process inherits that Ctrl-C is ignored: tests of it would say how pytest was started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def code_of_checkpoints(tmp_path_factory):
    """Where transformers copies the code in a checkpoint before it imports it: one folder, and not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def dream_dir(tmp_path_factory) -> Path:
    return write_dream(tmp_path_factory.mktemp("dream"))


@pytest.fixture(scope="session")
def llada_dir(tmp_path_factory) -> Path:
    return write_llada(tmp_path_factory.mktemp("llada"))


@pytest.fixture(scope="session", params=["dream", "llada"])
def family_dir(request) -> Path:
    return request.getfixturevalue(f"{request.param}_dir")


@pytest.fixture(scope="module")
def policy(family_dir) -> Policy:
    return load_policy(family_dir)


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory) -> Path:
    return write_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="session")
def judge_dir(tmp_path_factory) -> Path:
    return write_reward(tmp_path_factory.mktemp("judge"), seed=2)


@pytest.fixture
def tiny(tmp_path, tiny_in) -> dict:
    """The settings of a whole run. Tests change what they are about, for `training.go` or `training.write`."""
    return tiny_in(tmp_path)


@pytest.fixture(scope="session")
def tiny_in(dream_dir, reward_dir, judge_dir) -> Callable[[Path], dict]:
    return lambda folder: tiny_settings(folder, dream_dir, reward_dir, judge_dir)


def tiny_settings(folder: Path, dream_dir: Path, reward_dir: Path, judge_dir: Path) -> dict:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    run = {"output_dir": str(folder / "run"), "steps": 2, "save_steps": 1, "eval_steps": 2, "prompts_per_device": 2}
    return {
        "model": {"path": str(dream_dir)},
        "lora": {"r": 4, "alpha": 8},
        "data": {"path": str(prompts), "eval_path": str(prompts), "max_prompt_length": 16, "eval_prompts": 4},
        "reward": {"path": str(reward_dir)},
        "judge": {"path": str(judge_dir)},
        "rollout": {"num_generations": 2, "max_completion_length": 8, "steps": 4},
        "guidance": {"kind": "entrgi"},
        "objective": {"name": "reinforce", "beta": 0.01},
        "optim": {"learning_rate": 1e-3},
        "run": run,
        "tracking": {"wandb": False, "completions_steps": 1},
    }
