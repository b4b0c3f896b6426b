"""Recipes of real models: full size on the meta device, one step at a small size; and presets on rows of their columns.

The rows below are made up, in the columns and types of the data sets. Nothing is downloaded.
"""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from bench import make_tokenizer
from checkpoints import REPO
from hours import SIZES, hours
from processes import finish, launch_file, start
from published import DREAM, POLICIES, REWARDS, WEIGHTS, write_tiny
from training import tables, write
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForSequenceClassification

from rgrl.config import load_config, presets
from rgrl.data import load_data
from rgrl.models.families import find_family
from rgrl.models.families.fields import check_fields
from rgrl.models.lora import expand_targets, find_layers
from rgrl.models.policy import Policy
from rgrl.rewards.total import load_functions
from rgrl.tracking import read_metrics
from rgrl.trainer import train
from rgrl.types import turns_of

FOLDERS = ("dream_7b", "llada_8b", "qwen3_0p6b_a2d")
RECIPES = sorted(path for folder in FOLDERS for path in (REPO / "recipes" / folder).glob("*.yaml"))
NEEDED = {"model": {"path": "a"}, "reward": {"path": "c"}, "run": {"output_dir": "d"}}
BITS = importlib.util.find_spec("bitsandbytes") is not None

CHAT = [{"role": "user", "content": "Write about {}."}, {"role": "assistant", "content": "No."}]
CHAT += [{"role": "user", "content": "Please."}, {"role": "assistant", "content": "Never."}]
LMSYS = {"conversation_id": "a{}", "model": "vicuna-13b", "conversation": CHAT, "turn": 2, "redacted": False}
GSM8K = {"question": "Ann has {} apples and buys 2. How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
MATH = {"problem": "Solve $2x = {}$.", "level": "Level 1", "type": "Algebra", "id": "algebra/{}.json"}
MATH |= {"solution": r"So $x = \boxed{\frac{1}{2}}$.", "expected_answer": r"\frac{1}{2}"}
# Preset -> a row of each split that it reads, by the columns of the data set. `{}` in a text is the row's number.
ROWS: dict[str, dict[str, dict]] = {
    "wildchat_if": {
        "train": {"id": "a{}", "prompt": "Write about {}.", "chosen": CHAT, "rejected": CHAT, "source": "wildchat"}
    },
    "lmsys_chat": {"train": {**LMSYS, "language": "English", "openai_moderation": [{"flagged": False}]}},
    "magpie_ultra": {"train": {"messages": CHAT, "category": "math", "difficulty": "easy", "quality": "good"}},
    "gsm8k": {"train": GSM8K, "test": GSM8K},
    "math500": {"train": MATH, "math500": MATH, "test": MATH},
}
# The same -> what its verifier pays for, and what not.
ANSWERS = {
    "gsm8k": (lambda row: "So it is 5.\n#### 5", lambda row: "So it is 6.\n#### 6"),
    "math500": (lambda row: r"Thus $\boxed{\dfrac12}$", lambda row: r"Thus $\boxed{\frac{1}{3}}$"),
    "countdown": (lambda row: f"<answer>{row['solution']}</answer>", lambda row: "<answer>1 + 1</answer>"),
    "sudoku4": (lambda row: f"<answer>{row['solution']}</answer>", lambda row: f"<answer>{'1234' * 4}</answer>"),
}


@pytest.fixture(autouse=True)
def cache_of_data_sets(tmp_path, monkeypatch):
    """Where `datasets` keeps what it has read: not the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def filled(value, number: int):
    """A row with its number in place of `{}`, in all texts."""
    if isinstance(value, dict):
        return {key: filled(one, number) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, number) for one in value]
    return value.replace("{}", str(number)) if isinstance(value, str) else value


def write_rows(preset: str, folder: Path, count: int = 8) -> list[str]:
    """A data set in that preset's columns, laid out like the Hub's; returns the overrides that name it instead."""
    if preset not in ROWS:
        return ["--data.generate_rows", str(10 * count)]
    rows = {
        split: datasets.Dataset.from_list([filled(row, 1000 * k + i) for i in range(count)])
        for k, (split, row) in enumerate(ROWS[preset].items())
    }
    subset = load_config(write(NEEDED | {"extends": preset}, folder.parent / "preset.yaml")).data.subset
    if subset is None:
        datasets.DatasetDict(rows).save_to_disk(folder)
        return ["--data.path", str(folder)]
    folder.mkdir()
    files = [{"split": split, "path": f"{subset}/{split}-*"} for split in rows]
    other = [{"split": "train", "path": "other/train-*"}]
    configs = [{"config_name": subset, "data_files": files}, {"config_name": "other", "data_files": other}]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    for split, table in rows.items():
        table.to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
    next(iter(rows.values())).to_parquet(folder / "other" / "train-00000-of-00001.parquet")
    return ["--data.path", str(folder)]


# --------------------------------------------------------------------------------------------------------- presets
SLOW = {"math500"}  # math-verify is imported in a process of its own


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in presets.names()]
)
def test_a_preset_reads_its_columns_and_scores_by_them(name, tmp_path):
    words = write_rows(name, tmp_path / "rows", 40 if name in ANSWERS else 400)  # one in a hundred is held out
    config = load_config(write(NEEDED | {"extends": name}, tmp_path), words)
    training, evaluation = load_data(config.data)
    assert len(training) >= 30 and evaluation is not None and len(evaluation) >= 1
    assert training.tally.bad == 0 and not {*training.texts} & {*evaluation.texts}
    shown, row = turns_of(training.take([0]).chats[0]), training.rows[0]
    assert [turn["role"] for turn in shown] == (["system", "user"] if config.data.system else ["user"])
    if name not in ANSWERS:
        assert re.fullmatch(r"Write about \d+\.", shown[-1]["content"]) and config.data.eval_fraction > 0
        return
    if name in ROWS:
        assert shown[-1]["content"] == row["question" if name == "gsm8k" else "problem"]
        number = {int(re.search(r"\d{4}", text)[0]) // 1000 for text in evaluation.texts}
        assert number == {1}, "evaluates on another split"
    if name == "math500" and importlib.util.find_spec("math_verify") is None:
        pytest.skip("needs math-verify")
    rewards = load_functions(config.reward)
    assert not rewards.dry_run(training, evaluation)
    for prompts in (training.take(range(5)), evaluation.take([0])):
        for answer, paid in zip(ANSWERS[name], (1.0, 0.0), strict=True):
            found = rewards.score(prompts, [answer(row) for row in prompts.rows])
            assert found.total_B.tolist() == [paid] * len(prompts)


def test_lmsys_is_read_in_english_alone(tmp_path):
    write_rows("lmsys_chat", tmp_path / "rows", 40)
    rows = datasets.load_from_disk(tmp_path / "rows")["train"]
    mixed = rows.map(lambda row, i: row | {"language": ["English", "German"][i % 2]}, with_indices=True)
    datasets.DatasetDict({"train": mixed}).save_to_disk(tmp_path / "mixed")
    words = ["--data.path", str(tmp_path / "mixed"), "--data.eval_fraction", "0"]
    training, _ = load_data(load_config(write(NEEDED | {"extends": "lmsys_chat"}, tmp_path), words).data)
    assert {row["language"] for row in training.rows} == {"English"} and training.tally.elsewhere == 20


# ------------------------------------------------------------------------------------------------------- full size
@functools.cache
def on_meta(hub_id: str) -> PreTrainedModel:
    """The model of the published config.json at full size, without memory for it, as `load_policy` makes it."""
    raw = POLICIES.get(hub_id)
    with torch.device("meta"):
        if raw is None:
            return Qwen3ForSequenceClassification(Qwen3Config(**REWARDS[hub_id], num_labels=1))
        family = find_family(raw["model_type"])
        config = family.make_config(raw)
        check_fields(raw, family.fields, family.name)
        return family.model_class(config)


@functools.cache
def recipe(path: Path):
    """A recipe's settings, which no test changes."""
    return load_config(path)


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_models_at_full_size(path):
    config = recipe(path)
    model = on_meta(config.model.path)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert count(model.parameters()) / 1e6 == pytest.approx(WEIGHTS[config.model.path], rel=1e-3)
    family = find_family(POLICIES[config.model.path]["model_type"], config.model.family)
    policy = Policy(model, make_tokenizer(100), family, 98, config.model.path)
    layers = find_layers(policy, expand_targets(policy, config.lora.targets))
    adapted = [model.get_submodule(layer) for layer in layers]
    assert len(layers) == 7 * model.config.num_hidden_layers, "not all seven projections"
    trained = config.lora.r * sum(layer.in_features + layer.out_features for layer in adapted)
    # docs/scaling.md: 80.7 and 83.9 million at rank 32.
    expected = {"Dream-org": 80.740, "GSAI-ML": 83.886, "dllm-hub": 20.185}[config.model.path.split("/")[0]]
    assert trained / 1e6 == pytest.approx(expected * config.lora.r / 32, rel=1e-4)
    for hub_id in filter(None, (config.reward.path, config.judge.path, config.guidance.path)):
        assert count(on_meta(hub_id).parameters()) / 1e6 == pytest.approx(WEIGHTS[hub_id], rel=1e-3)
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    assert longest <= model.config.max_position_embeddings


def test_the_sizes_that_hours_are_computed_from():
    for hub_id, size in SIZES.items():
        model = on_meta(hub_id)
        assert count(model.model.layers.parameters()) == pytest.approx(size.layers, rel=1e-3)
        assert tuple(model.get_input_embeddings().weight.shape) == (size.vocab, size.width)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_a_recipe_says_at_its_head(path):
    head = " ".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"--config {path.relative_to(REPO)}" in head
    assert re.search(r"Paper: .*arXiv \d{4}\.\d{5}", head) and "Hardware: " in head and "not run" in head.lower()
    told = float(re.search(r"Hours: ([\d.]+) at an assumed 400 TFLOP/s a GPU", head)[1])
    assert "computed and not run" in head
    processes, prompt = (8, 200) if path.stem == "gsm8k" else (1 if "qwen3" in str(path) else 2, 100)
    assert hours(recipe(path), processes, prompt, 400.0)["all"] == pytest.approx(told, abs=0.06)
    folders = [recipe(other).run.output_dir for other in RECIPES]
    assert folders.count(recipe(path).run.output_dir) == 1


# ------------------------------------------------------------------------------------------------------- small size
@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny checkpoints of the same formats, by Hub id, written once."""
    return functools.cache(lambda hub_id: write_tiny(hub_id, tmp_path_factory.mktemp("tiny") / hub_id.split("/")[1]))


def small(path: Path, checkpoints, folder: Path) -> list[str]:
    """Overrides that change sizes and places, and nothing else."""
    config = recipe(path)
    words = write_rows("gsm8k" if path.stem == "gsm8k" else "wildchat_if", folder / "rows", 40)
    for section in ("model", "reward", "judge", "guidance"):
        if hub_id := getattr(config, section).path:
            words += [f"--{section}.path", str(checkpoints(hub_id))]
    block = config.rollout.block_length and 4
    changed = {
        "model.quantize": config.model.quantize if BITS else "none",
        "rollout.max_completion_length": 8,
        "rollout.steps": 8,
        "rollout.block_length": block,
        "data.eval_prompts": 4,
        "data.eval_fraction": config.data.eval_fraction and 0.2,
        "run.steps": 1,
        "run.output_dir": folder / "run",
        "tracking.wandb": "false",
    }
    if path.stem == "gsm8k":  # random text is never right, and where all get 0 there is nothing to learn from
        changed["reward.functions.length"] = "{settings: {most: 1, slack: 100, unit: characters}}"
    return words + [word for key, value in changed.items() for word in (f"--{key}", str(value))]


def check_step(output: Path, config) -> None:
    """One step was learned from, evaluated and saved, with the optimizer's settings."""
    line = next(line for line in read_metrics(output / "metrics.jsonl") if "loss" in line)
    assert line["update/skipped"] == 0 and line["grad_norm"] > 0
    saved = output / "checkpoints" / "step_000001"
    group = torch.load(saved / "state.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert list(group["betas"]) == config.optim.betas and group["weight_decay"] == config.optim.weight_decay
    rows = tables(output)["train_000001.parquet"]
    assert len(rows) % config.rollout.num_generations == 0 and all(row["reward"] is not None for row in rows)
    assert any(name.startswith("eval_") for name in tables(output))


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_one_step_at_a_small_size(path, checkpoints, tmp_path):
    config = load_config(path, small(path, checkpoints, tmp_path))
    check_step(train(config), config)


@pytest.mark.slow
def test_the_papers_recipe_on_two_processes(checkpoints, tmp_path):
    """LoRA 32 / 32 / 0.1, prompt mask 0.3, in 4 bits where bitsandbytes is there; the launch line of its head."""
    path = REPO / "recipes" / "dream_7b" / "likelihood.yaml"
    words = small(path, checkpoints, tmp_path)
    config = load_config(path, words)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout, config.objective.prompt_mask) == (32, 32, 0.1, 0.3)
    assert config.model.path == str(checkpoints(DREAM)) and config.guidance.kind == "entrgi"
    launcher = [*launch_file("cpu"), "--num_processes", "2", "-m"]
    finish(start("rgrl", "train", "--config", path, *words, launcher=launcher))
    output = tmp_path / "run"
    check_step(output, config)
    assert len(tables(output)["train_000001.parquet"]) == 2 * 8  # 8 completions a device, as in the paper
    resolved = load_config(output / "config.yaml")
    assert len(resolved.lora.targets) == 7
    resolved.lora.targets = config.lora.targets
    for section in ("lora", "rollout", "guidance", "objective", "optim"):
        assert dataclasses.asdict(getattr(resolved, section)) == dataclasses.asdict(getattr(config, section))
