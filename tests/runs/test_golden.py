"""Loss, gradient norm and reward of three tiny runs, as recorded in golden.json: a refactoring changes none of them.

After a change that is meant to change numbers, record them anew and say so in the commit:

    RGRL_WRITE_GOLDEN=1 pytest tests/runs/test_golden.py
"""

import json
import os
from pathlib import Path

import pytest
from checkpoints import write_reward
from safetensors.torch import load_file, save_file
from training import changed, go, untimed

GOLDEN = Path(__file__).with_name("golden.json")
RUNS = {
    "reinforce": {"guidance": {"kind": "none"}, "objective": {"name": "reinforce", "beta": 0.05}},
    "grpo": {
        "guidance": {"kind": "entrgi", "steps": 2, "share": 0.5},
        "rollout": {"steps": 8, "block_length": 4},
        "objective": {"name": "grpo", "beta": 0.05, "iterations": 2, "correction": "truncate"},
        "run": {"gradient_accumulation_steps": 2},
    },
    "likelihood": {"objective": {"name": "likelihood", "beta": 0.0, "estimator": "coupled"}},
}


@pytest.fixture(scope="module")
def smooth_guide(tmp_path_factory) -> Path:
    """A reward so small that Adam's step is smooth: otherwise the sign of a rounding error could decide a token."""
    folder = write_reward(tmp_path_factory.mktemp("guide"))
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"score.weight": weights["score.weight"] * 3e-8}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_numbers_are_those_recorded(tiny, tmp_path, smooth_guide, llada_dir, name):
    config = changed(tiny, **RUNS[name])
    config = changed(config, lora={"dropout": 0.1}, guidance={"path": str(smooth_guide)})
    if name == "likelihood":
        config = changed(config, model={"path": str(llada_dir)})
    lines = untimed(go(config, tmp_path, steps=4, save_steps=0, eval_steps=0))
    numbers = [{key: line[key] for key in ("loss", "grad_norm", "reward")} for line in lines]
    assert len(numbers) == 4
    recorded = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("RGRL_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(recorded | {name: numbers}, indent=1) + "\n")
        return
    for step, (now, then) in enumerate(zip(numbers, recorded[name], strict=True), 1):
        assert now == pytest.approx(then, rel=1e-4, abs=1e-5), f"step {step}"
