"""Whole runs as they were recorded: a refactoring changes none of their numbers.

numbers.json holds, for each run, its metrics step by step and a digest of everything it leaves behind. On the processor
and the library versions of the recording the digest must match: every bit of the adapter, the metrics and the tables.
Elsewhere the metrics of the tiny runs must match to rounding; those of the shipped recipes, whose guidance may turn a
rounding error into another token, are then not compared.

After a change that is meant to change numbers, record them again and say so in the commit: `make golden`. To compare
two commits bit for bit on a machine of another kind, record on the first and test on the second.
"""

import hashlib
import importlib
import json
import os
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import REPO, write_reward
from safetensors.torch import load_file, save_file
from training import adapter, changed, go, tables, untimed

from rgrl.config import load_config
from rgrl.trainer import evaluate, train

NUMBERS = Path(__file__).with_name("numbers.json")
KEYS = ("loss", "grad_norm", "reward")
# Measurements that release 0.1.0 took beside the updates, and later ones do not.
REMOVED = ("gradient/promised", "gradient/came_true")

UNGUIDED = {"guidance": {"kind": "none"}}
TINY = {
    "reinforce": UNGUIDED | {"objective": {"name": "reinforce", "beta": 0.05}},
    "grpo": {
        "guidance": {"kind": "entrgi", "steps": 2, "share": 0.5},
        "rollout": {"steps": 8, "block_length": 4},
        "objective": {"name": "grpo", "beta": 0.05, "correction": "truncate"},
        "optim": {"updates": 2},
        "run": {"gradient_accumulation_steps": 2},
    },
    "likelihood": {"objective": {"name": "likelihood", "beta": 0.0, "estimator": "coupled"}},
    # Each objective with an estimator that it allows, and each estimator at least once.
    "weighted": UNGUIDED
    | {"objective": {"name": "weighted", "advantage": "reward_weighted", "estimator": "trajectory"}},
    "wd1": UNGUIDED | {"objective": {"name": "wd1", "advantage": "wd1", "estimator": "trajectory_sampled"}},
    "spg": UNGUIDED | {"objective": {"name": "spg", "estimator": "block_bounds", "block_length": 4, "beta": 0.0}},
    "dmpo": UNGUIDED | {"objective": {"name": "dmpo", "advantage": "tilted", "estimator": "elbo"}},
    "gdsd": UNGUIDED
    | {
        "objective": {
            "name": "gdsd",
            "estimator": "sequence_elbo",
            "level": "sequence",
            "redraw": True,
        },
        "optim": {"updates": 2},
    },
    "tilt_matching": UNGUIDED
    | {
        "objective": {
            "name": "tilt_matching",
            "advantage": "tilted",
            "estimator": "quadrature",
            "redraw": True,
            "kl": "full",
        },
        "optim": {"updates": 2},
    },
    # The reward's gradient alone, in blocks and micro-batches, and beside an objective.
    "gradient": {
        "objective": {"weight": 0.0},
        "optim": {"updates": 2},
        "gradient": {"weight": 1.0, "kl": 0.5, "states": "late", "blend": "expectation", "draws": 2},
        "rollout": {"steps": 8, "block_length": 4},
        "run": {"gradient_accumulation_steps": 2},
    },
    "gradient_and_grpo": {
        "guidance": {"kind": "entrgi", "share": 0.5},
        "objective": {"name": "grpo", "beta": 0.05, "kl": "full", "correction": "mask"},
        "optim": {"updates": 2},
        "gradient": {"weight": 0.5, "kl": 0.0, "places": "block", "blend": "entrgi"},
        "rollout": {"block_length": 4},
    },
}
SMALL = ["--run.steps", "2", "--run.prompts_per_device", "2", "--run.save_steps", "1", "--run.eval_steps", "2"]
SMALL += ["--data.eval_prompts", "8", "--tracking.completions_steps", "1", "--tracking.wandb", "false"]
RECIPES = {
    "rgrl": "recipes/reviews/rgrl.yaml",  # the default: the reward's gradient at the expected embeddings
    "llada": "recipes/reviews/llada.yaml",  # a guide with another tokenizer: the bridge
    "sparse": "recipes/reviews/sparse.yaml",  # a reward by rule, with a guide that does not score
}


def machine() -> str:
    """What decides the bits of a float: the processor, and the libraries that compute on it."""
    info = Path("/proc/cpuinfo")
    flags = (
        next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.exists() else ""
    )
    parts = (
        platform.machine(),
        hashlib.sha256(flags.encode()).hexdigest()[:12],
        torch.backends.cpu.get_cpu_capability(),
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    )
    return ", ".join(parts)


def digest(output: Path, steps: int) -> str:
    """Of the adapter's bytes, all metrics but timings, and all tables."""
    lines = [{key: value for key, value in line.items() if key not in REMOVED} for line in untimed(output)]
    text = json.dumps([lines, tables(output)], sort_keys=True, default=str)
    return hashlib.sha256(adapter(output, steps) + text.encode()).hexdigest()


def check(name: str, lines: list[dict], digested: str) -> None:
    """Compare a run with what is recorded, or record it."""
    numbers = [{key: line[key] for key in KEYS if key in line} for line in lines]
    recorded = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    if os.environ.get("RGRL_WRITE_GOLDEN"):
        recorded[name] = {"steps": numbers, "digest": digested, "machine": machine()}
        NUMBERS.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")
        return
    then = recorded[name]
    if then["machine"] == machine():
        assert digested == then["digest"], f"{name} differs from its record: {numbers} instead of {then['steps']}"
    elif name in TINY:
        for step, (now, before) in enumerate(zip(numbers, then["steps"], strict=True), 1):
            assert now == pytest.approx(before, rel=1e-4, abs=1e-5), f"step {step}"


@pytest.fixture(scope="module")
def smooth_guide(tmp_path_factory) -> Path:
    """A reward so small that Adam's step is smooth: otherwise the sign of a rounding error could decide a token."""
    folder = write_reward(tmp_path_factory.mktemp("guide"))
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"score.weight": weights["score.weight"] * 3e-8}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("name", TINY)
def test_tiny_runs_are_as_recorded(tiny, tmp_path, smooth_guide, llada_dir, name):
    config = changed(tiny, **TINY[name])
    config = changed(config, lora={"dropout": 0.1}, guidance={"path": str(smooth_guide)})
    if name == "likelihood":
        config = changed(config, model={"path": str(llada_dir)})
    output = go(config, tmp_path, steps=3, save_steps=0, eval_steps=0)
    check(name, untimed(output), digest(output, 3))


@pytest.mark.slow
def test_the_loop_without_a_trainer_computes_what_the_trainer_does(tmp_path, monkeypatch):
    """examples/rl_loop.py, and the command that its docstring names: metrics to the last bit."""
    monkeypatch.chdir(REPO)
    monkeypatch.syspath_prepend(REPO / "examples")
    loop = importlib.import_module("rl_loop")
    history = loop.main(steps=3, output=tmp_path / "adapter")
    [command] = re.findall(r"rgrl train --config (.+)", loop.__doc__)
    recipe, *words = command.split()
    short = ["--run.steps", "3", "--run.eval_steps", "0", "--tracking.wandb", "false"]
    output = train(load_config(recipe, [*words, *short, "--run.output_dir", str(tmp_path / "run")]))
    lines = untimed(output)
    assert history == [{key: line[key] for key in step} for step, line in zip(history, lines, strict=True)]
    check("rl_loop", lines, digest(output, 3))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = load_file(output / "checkpoints" / "step_000003" / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.square().sum() for tensor in saved.values()) == pytest.approx(
        sum(tensor.square().sum() for tensor in trained.values())
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_are_as_recorded(tmp_path, monkeypatch, name):
    """Two steps of each, with an evaluation before and after; the second again, resumed; the last evaluation again."""
    monkeypatch.chdir(REPO)
    monkeypatch.syspath_prepend(REPO)  # the sparse recipe's rule is a module there
    words = [*SMALL, "--run.output_dir", str(tmp_path / "run")]
    output = train(load_config(RECIPES[name], words))
    lines = untimed(output)
    check(name, lines, digest(output, 2))
    found = evaluate(load_config(RECIPES[name], [*words, "--run.resume_from_checkpoint", "latest"])).metrics
    shared = [key for key in found if key in lines[-1]]
    assert "eval/reward" in shared and {key: found[key] for key in shared} == {key: lines[-1][key] for key in shared}
    moved = shutil.move(output / "checkpoints" / "step_000001", tmp_path)
    words = [*words, "--run.resume_from_checkpoint", str(moved), "--run.output_dir", str(tmp_path / "resumed")]
    assert adapter(train(load_config(RECIPES[name], words)), 2) == adapter(output, 2)
