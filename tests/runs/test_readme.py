"""The documented commands run, what the README explains is complete, and it stays short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import REPO
from training import go

from rgrl.config import load_config
from rgrl.metrics import METRICS
from rgrl.tracking import read_metrics

PAGES = ("README.md", "docs/usage.md", "docs/results.md")
LINES = [
    line.removeprefix("pip install -e . && ")
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", (REPO / page).read_text(), re.S)
    for line in block.splitlines()
]
COMMANDS = [line.split() for line in LINES if line.startswith(("accelerate", "python", "rgrl"))]
SHORT = {  # what makes it short, by a word of the command
    "examples/rl_loop.py": ["--steps", "1"],
    "recipes/bench.py": ["--shape", "tiny", "--rounds", "1"],
    "recipes/reviews/price.py": ["--only", "unguided", "--seeds", "1", "--rounds", "1"],
    "recipes/reviews/compare.py": (
        "--only diffu_grpo --seeds 0 --budget 2 --evals 1 --rounds 1 --prompts 8 --judge recipes/reviews/judge".split()
    ),
    "--config": ["--run.steps", "1", "--data.eval_prompts", "8"],
    "report": [],
    "export": [],
    "judge": [],
}


def shortened(words: list[str], folder: Path) -> list[str]:
    """The command made short, and writing below `folder`; the settings under test stay as they are."""
    if "--config" in words and "--run.output_dir" not in words:
        words = [*words, "--run.output_dir", "runs/reviews"]
    words = [str(folder / word) if word.startswith("runs/") else word for word in words]
    return [*words, *next(more for key, more in SHORT.items() if key in words)]


@pytest.mark.slow
def test_every_documented_command_runs_in_the_order_given(tmp_path):
    env = {**os.environ, "WANDB_MODE": "offline", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert {words[0] for words in COMMANDS} == {"accelerate", "python", "rgrl"} and len(COMMANDS) >= 9
    for command in COMMANDS:
        words = shortened(command, tmp_path)
        done = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{words}\n{done.stderr[-2000:]}"


def test_the_set_up_is_two_commands_of_one_line():
    readme = (REPO / "README.md").read_text()
    marked = re.findall(r"<!-- ci: (\w+) -->\n```bash\n(.*?)```", readme, re.S)
    assert [name for name, _ in marked] == ["quickstart", "tests"]
    assert all(re.fullmatch(r"pip install -e \S+ && .+\n", command) for _, command in marked)


def test_every_logged_metric_is_in_the_glossary(tiny, tmp_path):
    tiny["objective"] |= {"name": "grpo"}
    tiny["optim"] |= {"updates": 2}
    tiny["gradient"] = {"weight": 1.0}
    tiny["reward"]["functions"] = {"processes:die_at_call": 0.5}
    tiny["eval"] = {"samples": 2, "passes": {"die_at_call": 1.0}}
    logged = {key for line in read_metrics(go(tiny, tmp_path) / "metrics.jsonl") for key in line} - {"step"}
    generic = {re.sub(r"^(eval/)?rewards/[^/]+/", r"\1rewards/<name>/", key) for key in logged}
    generic = {re.sub(r"/pass_at_\d+$", "/pass_at_<k>", key) for key in generic}
    assert generic <= METRICS.keys()
    bridge = {name for name in METRICS if name.startswith("bridge/")}  # tests/runs/test_bridged_run.py
    assert METRICS.keys() <= generic | bridge | {"time/checkpoint"}, "the glossary explains what nothing logs"


def test_shipped_recipes_resolve():
    for path in (REPO / "recipes").glob("*/*.yaml"):
        config = load_config(path)
        # A shipped model, or one of the Hub.
        assert Path(REPO / config.model.path / "config.json").is_file() or path.parent.name != "reviews"
        assert path.read_text().startswith("#"), f"{path.name} must begin with how to launch it"


def test_the_front_page_is_short():
    readme, results = ((REPO / name).read_bytes() for name in ("README.md", "docs/results.md"))
    assert readme.count(b"\n") <= 150 and len(readme) <= 9_000 and len(results) <= 8_000


def test_links_between_pages_lead_somewhere():
    pages = [*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("experiments/*.md"), *REPO.glob("recipes/**/*.md")]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(REPO)}: {target}")
    assert not broken and len(pages) > 10
