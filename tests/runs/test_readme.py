"""The README's commands run, and what it explains is complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import REPO
from training import go

from rgrl.config import load_config
from rgrl.tracking import METRICS, read_metrics

COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    for line in block.splitlines()
    if line.startswith(("accelerate", "python"))
]


@pytest.mark.slow
def test_every_rgrl_command_of_the_readme_runs_in_the_order_given(tmp_path):
    """Shortened to one step, and writing elsewhere; the settings under test stay as they are."""
    env = {**os.environ, "WANDB_MODE": "offline", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert len(COMMANDS) >= 5
    short = {
        "recipes/bench.py": ["--shape", "tiny", "--rounds", "1"],
        "recipes/reviews/price.py": ["--only", "exact", "unguided", "--seeds", "1", "--rounds", "1"],
        "recipes/reviews/compare.py": "--only diffu_grpo --seeds 0 --budget 2 --evals 1 --rounds 1 --out".split(),
    }
    for command in COMMANDS:
        words = command.split()
        if words[1] == "recipes/reviews/compare.py":
            words += [*short[words[1]], str(tmp_path / "compare")]
        elif words[1] in short:
            words += short[words[1]]
        else:
            if "--run.output_dir" not in words:
                words += ["--run.output_dir", str(tmp_path / "run")]
            at = words.index("--run.output_dir") + 1
            words[at] = str(tmp_path / words[at])
            words += ["--run.steps", "1", "--data.eval_prompts", "8"]
        done = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


def test_every_logged_metric_is_in_the_glossary(tiny, tmp_path):
    tiny["objective"] |= {"name": "grpo", "iterations": 2}
    tiny["reward"]["functions"] = {"processes:die_at_call": 0.5}
    logged = {key for line in read_metrics(go(tiny, tmp_path) / "metrics.jsonl") for key in line} - {"step"}
    generic = {re.sub(r"^rewards/[^/]+/", "rewards/<name>/", key) for key in logged}
    assert generic <= METRICS.keys()
    assert METRICS.keys() <= generic | {"time/checkpoint"}, "the glossary explains what nothing logs"


def test_shipped_recipes_resolve():
    for path in (REPO / "recipes").glob("*/*.yaml"):
        config = load_config(path)
        assert Path(REPO / config.model.path / "config.json").is_file()
        assert path.read_text().startswith("#"), f"{path.name} must begin with how to launch it"
