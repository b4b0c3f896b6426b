"""Bad input: one line that names the problem, exit code 2, before any long work and without touching the results."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from checkpoints import PROMPTS, random_weights, write_dream, write_llada, write_reward
from processes import TRAIN, finish, start
from safetensors.torch import load_file, save_file
from training import go

from rgrl.cli import run
from rgrl.config import Config
from rgrl.errors import ConfigError
from rgrl.folder import claim, new_owner
from rgrl.models.families.dream import DREAM
from rgrl.trainer import evaluate, train


@dataclass
class Command:
    """What a command is called with: a case spoils one thing in it."""

    config: dict
    folder: Path  # for files that a case writes
    finished: Path  # the output folder of a finished run
    arguments: list[str] = field(default_factory=list)
    text: str | None = None  # the YAML itself, where a case writes it by hand
    missing: bool = False  # leave out the file named by --config

    @property
    def output(self) -> Path:
        return Path(self.config["run"].get("output_dir") or self.folder / "run")

    def put(self, key: str, value: object) -> None:
        *sections, last = key.split(".")
        node = self.config
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value

    def puts(self, **settings: object) -> None:
        """With `__` for the dot between a section and its key."""
        for key, value in settings.items():
            self.put(key.replace("__", "."), value)

    def words(self) -> list[str]:
        path = self.folder / "config.yaml"
        if not self.missing:
            path.write_text(self.text if self.text is not None else yaml.safe_dump(self.config))
        return ["--config", str(path), *self.arguments]

    def resume(self, **changes: object) -> None:
        """Go on in a copy of the finished run, with some settings changed."""
        self.config = yaml.safe_load((self.finished / "config.yaml").read_text())
        output = shutil.copytree(self.finished, self.folder / "run")
        self.puts(run__output_dir=str(output), run__resume_from_checkpoint="latest", run__steps=2)
        self.puts(**changes)


Change = Callable[[Command], object]


def put(key: str, value: object) -> Change:
    return lambda c: c.put(key, value)


def puts(**settings: object) -> Change:
    return lambda c: c.puts(**settings)


def drop(section: str, key: str) -> Change:
    return lambda c: c.config[section].pop(key)


def arguments(*words: str) -> Change:
    return lambda c: c.arguments.extend(words)


def text(content: str) -> Change:
    return lambda c: setattr(c, "text", content)


def data(name: str, content: str | bytes, **settings: object) -> Change:
    """Training prompts in a file of the given content."""

    def change(c: Command) -> None:
        path = c.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        c.puts(data__path=str(path), **settings)

    return change


def folder_of(key: str, *files: str) -> Change:
    """A folder with nothing but some empty JSON files."""

    def change(c: Command) -> None:
        path = c.folder / "odd"
        path.mkdir()
        for name in files:
            (path / name).write_text("{}")
        c.put(key, str(path))

    return change


Spoil = Callable[[Path], object]


def spoiled(key: str, write: Callable[..., Path], spoil: Spoil, **settings: object) -> Change:
    """A checkpoint written to disk as it should be, and then spoiled."""

    def change(c: Command) -> None:
        path = write(c.folder / "spoiled", **settings)
        spoil(path)
        c.put(key, str(path))

    return change


def dream(spoil: Spoil, **settings: object) -> Change:
    return spoiled("model.path", write_dream, spoil, **settings)


def llada(spoil: Spoil) -> Change:
    return spoiled("model.path", write_llada, spoil)


def reward(spoil: Spoil, **settings: object) -> Change:
    return spoiled("reward.path", write_reward, spoil, **settings)


def config_json(**changes: object) -> Spoil:
    """Set keys of config.json in a checkpoint; None takes a key out."""

    def edit(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))

    return edit


def remove(*patterns: str) -> Spoil:
    def unlink(folder: Path) -> None:
        found = [path for pattern in patterns for path in folder.glob(pattern)]
        assert found
        for path in found:
            path.unlink()

    return unlink


def cut(name: str) -> Spoil:
    return lambda folder: os.truncate(folder / name, 1000)


def without_tensor(name: str) -> Spoil:
    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def wider_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    save_file(random_weights(DREAM, config | {"intermediate_size": 64}), folder / "model.safetensors")


def functions(source: str, *names: str) -> Change:
    """Reward functions from a module of the given source, and no reward model."""

    def change(c: Command) -> None:
        (c.folder / "own_rewards.py").write_text(source)
        c.puts(reward={"functions": dict.fromkeys(names, 1.0)}, guidance__kind="none")

    return change


def resume(**changes: object) -> Change:
    return lambda c: c.resume(**changes)


def resume_spoiled(spoil: Spoil, mode: str = "latest") -> Change:
    def change(c: Command) -> None:
        c.resume(run__resume_from_checkpoint=mode)
        spoil(c.output / "checkpoints" / "step_000001")

    return change


def resume_with_other_data(c: Command) -> None:
    c.resume()
    data("other.txt", "the music is")(c)


def rename_to_partial(checkpoint: Path) -> None:
    """What a kill in the middle of the first save leaves behind."""
    checkpoint.rename(checkpoint.with_name(".partial_000001"))


def occupy(c: Command) -> None:
    shutil.copytree(c.finished, c.output)


def output_at(*names: str) -> Change:
    return lambda c: c.put("run.output_dir", str(c.folder.joinpath(*names)))


def saved_set(c: Command) -> None:
    import datasets

    folder = c.folder / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"prompt": PROMPTS})}).save_to_disk(folder)
    c.puts(data__path=str(folder), data__split="trian")


GRPO = {"objective__name": "grpo"}

# name, what is spoiled, words of the message
CASES: list[tuple[str, Change, list[str]]] = [
    # What settings rule out together; test_settings.py has those that are bad by themselves
    ("no model", drop("model", "path"), ["`model.path` is required"]),
    ("no data", drop("data", "path"), ["`data.path` is required"]),
    ("no output folder", drop("run", "output_dir"), ["`run.output_dir` is required"]),
    ("no reward", put("reward", {}), ["`reward.path`", "`reward.functions`"]),
    (
        "a sequence ratio with corrected tokens",
        puts(**GRPO, objective__level="sequence", objective__correction="mask"),
        ["`objective.level: sequence` needs `objective.correction_level: sequence`"],
    ),
    (
        "a token ratio of sequence estimates",
        puts(**GRPO, objective__estimator="elbo"),
        ["elbo", "whole completions", "`objective.level: sequence`"],
    ),
    ("bounds of another estimator", put("objective.name", "spg"), ["spg", "block_bounds", "one_step"]),
    (
        "a correction of imitation",
        puts(objective__name="likelihood", objective__correction="truncate"),
        ["likelihood", "takes no correction"],
    ),
    (
        "weights without their advantage",
        put("objective.name", "weighted"),
        ["`objective.name: weighted`", "`objective.advantage: reward_weighted`", "zscore"],
    ),
    ("C beyond the positions", put("rollout.max_completion_length", 60), ["60", "64 positions"]),
    ("unknown LoRA target", put("lora.targets", ["q_proj", "query"]), ["'query'", "k_proj"]),
    ("unknown objective", put("objective.name", "ppo"), ["objective 'ppo'", "reinforce", "grpo"]),
    ("unknown estimator", put("objective.estimator", "two_step"), ["estimator 'two_step'", "one_step"]),
    ("unknown advantage", put("objective.advantage", "rank"), ["advantage 'rank'", "zscore"]),
    ("objective not importable", put("objective.name", "no_such_module:loss"), ["no_such_module:loss", "imported"]),
    ("objective that is none", put("objective.name", "math:sqrt"), ["objective 'math:sqrt'", "Objective"]),
    ("estimator that is none", put("objective.estimator", "math:pi"), ["estimator 'math:pi'", "Estimator"]),
    *[
        (
            f"group of one with {name}",
            puts(rollout__num_generations=1, objective__advantage=name),
            [f"`objective.advantage: {name}`", "`rollout.num_generations`", "at least 2"],
        )
        for name in ("centred", "zscore", "leave_one_out")
    ],
    (
        "odd accumulation",
        put("run.gradient_accumulation_steps", 3),
        ["`run.gradient_accumulation_steps` (3)", "4 rows"],
    ),
    # The model
    ("no such model folder", put("model.path", "/no/such/model"), ["model.path /no/such/model", "no such folder"]),
    ("hub id that cannot be", put("model.path", "no body/at all"), ["no body/at all", "Hub"]),
    ("model without config.json", folder_of("model.path"), ["model.path", "no config.json"]),
    (
        "model whose config.json is not JSON",
        dream(lambda p: (p / "config.json").write_text("{'a': 1}")),
        ["config.json", "not readable JSON"],
    ),
    ("model without weights", dream(remove("*.safetensors")), ["no weights", "model.safetensors"]),
    ("missing shard", dream(remove("model-00002*"), shards=3), ["no weights", "model-00002-of-00003.safetensors"]),
    ("cut weights", dream(cut("model.safetensors")), ["model.safetensors", "not a readable safetensors file"]),
    (
        "model that lacks a tensor",
        dream(without_tensor("model.norm.weight")),
        ["don't fit config.json", "1 missing", "model.norm.weight"],
    ),
    ("weights of another size", dream(wider_weights), ["mlp.gate_proj", "(64, 32)", "config.json implies (48, 32)"]),
    ("LLaDA weights called Dream", llada(config_json(model_type="Dream")), ["config.json", "Dream", "hidden_size"]),
    ("odd heads", dream(config_json(num_attention_heads=5)), ["self_attn.q_proj", "config.json implies (30, 32)"]),
    ("config.json, wrong type", dream(config_json(hidden_size="wide")), ["config.json", "dream model", "hidden_size"]),
    ("unknown model_type", dream(config_json(model_type="gpt2")), ["model_type 'gpt2'", "Dream", "llada"]),
    (
        "Dream without a tokenizer",
        dream(remove("vocab.json", "merges.txt", "tokenizer_config.json")),
        ["no tokenizer", "vocab.json and merges.txt"],
    ),
    ("Dream without its merges", dream(remove("merges.txt")), ["no tokenizer", "vocab.json and merges.txt"]),
    ("LLaDA without a tokenizer", llada(remove("tokenizer*.json")), ["no tokenizer", "tokenizer.json"]),
    ("LLaDA without a mask token", llada(config_json(mask_token_id=None)), ["mask token"]),
    ("mask token beyond the tokenizer", dream(config_json(mask_token_id=5000)), ["mask token 5000", "4096 tokens"]),
    # Rewards
    ("no such reward model", put("reward.path", "/no/such/reward"), ["/no/such/reward", "no such folder"]),
    ("no such judge", put("judge.path", "/no/such/judge"), ["/no/such/judge", "no such folder"]),
    ("no such guide", put("guidance.path", "/no/such/guide"), ["/no/such/guide", "no such folder"]),
    ("reward model with two labels", reward(lambda p: None, labels=2), ["2 labels", "exactly 1"]),
    ("reward model without weights", reward(remove("*.safetensors")), ["reward model", "no weights"]),
    ("reward model with cut weights", reward(cut("model.safetensors")), ["reward model", "cannot be loaded"]),
    ("reward model without a head", reward(without_tensor("score.weight")), ["score.weight"]),
    ("wider reward", reward(config_json(intermediate_size=64)), ["reward model", "cannot be loaded"]),
    ("reward model of an unknown type", reward(config_json(model_type="nonesuch")), ["reward model", "nonesuch"]),
    ("reward model, no tokenizer", reward(remove("tokenizer*", "*.jinja")), ["reward model", "no tokenizer"]),
    ("reward adapter that is none", put("reward.adapter", "/no/such/adapter"), ["`reward.adapter`", "/no/such"]),
    (
        "guidance by functions",
        puts(reward={"functions": {"own:f": 1.0}}, guidance__kind="entrgi"),
        ["`guidance.kind: entrgi`", "gradient", "functions"],
    ),
    ("reward function without module", functions("", "brevity"), ["reward function 'brevity'", "package.module:attr"]),
    ("reward module not importable", functions("", "nonesuch:f"), ["reward function 'nonesuch:f'", "imported"]),
    ("reward function not there", functions("", "own_rewards:f"), ["'own_rewards:f'", "imported"]),
    ("reward function that is none", functions("f = 3", "own_rewards:f"), ["reward function 'f'", "called"]),
    (
        "two reward functions of one name",
        functions("from math import sqrt", "own_rewards:sqrt", "math:sqrt"),
        ["`reward.functions`", "same name"],
    ),
    # Data
    ("no such data file", put("data.path", "/no/such/prompts.jsonl"), ["/no/such/prompts.jsonl", "no such file"]),
    ("no such parquet file", put("data.path", "/no/such/p.parquet"), ["/no/such/p.parquet", "no such file"]),
    ("no such eval file", put("data.eval_path", "/no/such/eval.txt"), ["/no/such/eval.txt", "no such file"]),
    ("data of an unknown form", data("prompts.xml", "<p/>"), ["prompts.xml", ".jsonl", ".parquet"]),
    ("empty data set", data("empty.jsonl", "\n\n"), ["empty.jsonl", "no rows"]),
    ("empty csv", data("empty.csv", "prompt\n"), ["empty.csv", "no "]),
    ("line that is not JSON", data("bad.jsonl", '{"prompt": "a"}\n{"prompt"\n'), ["bad.jsonl", "line 2", "not JSON"]),
    ("line that is no object", data("bad.jsonl", '\n"text"\n'), ["bad.jsonl", "line 2", "object"]),
    ("json that is none", data("bad.json", '[{"prompt"'), ["bad.json", "cannot be read"]),
    ("parquet that is none", data("bad.parquet", "text"), ["bad.parquet", "cannot be read"]),
    ("text that is not UTF-8", data("bad.txt", b"caf\xe9\n"), ["bad.txt", "UTF-8"]),
    ("missing column", data("a.jsonl", '{"prompt": "a"}\n', data__column="question"), ["'question'", "it has prompt"]),
    ("row without prompt", data("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n'), ["row 1", "no prompt text"]),
    ("row without the column", data("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n'), ["row 1", "no prompt text"]),
    ("prompt too long", data("a.txt", "fine\n" + "the film " * 20), ["`data.max_prompt_length` = 16", "the film"]),
    ("folder without a data set", folder_of("data.path", "a.json"), ["odd", "cannot be read"]),
    ("unknown split", saved_set, ["'trian'", "train"]),
    # The output folder
    ("output folder in use", occupy, ["already holds a run", "--run.resume_from_checkpoint latest"]),
    ("output folder is a file", output_at("prompts.jsonl"), ["`run.output_dir`", "not a folder to write in"]),
    ("output below a file", output_at("prompts.jsonl", "run"), ["`run.output_dir`", "prompts.jsonl is not a folder"]),
    ("nothing to resume", put("run.resume_from_checkpoint", "latest"), ["nothing to resume", "checkpoints"]),
    ("only a partial checkpoint", resume_spoiled(rename_to_partial), ["nothing to resume", "checkpoints"]),
    ("no such checkpoint", put("run.resume_from_checkpoint", "/no/such/step"), ["/no/such/step", "not a checkpoint"]),
    ("resume with another rank", resume(lora__r=8), ["`lora.r` was 4 and is now 8"]),
    ("resume with another seed", resume(run__seed=1), ["`run.seed` was 0 and is now 1"]),
    ("resume with another dtype", resume(model__dtype="bfloat16"), ["`model.dtype` was float32 and is now bfloat16"]),
    ("resume with other data", resume_with_other_data, ["`data.path` held 6 prompts (", "now holds 1 prompts ("]),
    (
        "resume with other prompts a step",
        resume(run__prompts_per_device=2),
        ["had 1 prompts (1 processes x `run.prompts_per_device` 1)", "2 (1 x 2)", "`run.prompts_per_device` to 1"],
    ),
    ("resume with other groups", resume(rollout__num_generations=4), ["was 2 and is now 4"]),
    ("resume without the adapter", resume_spoiled(lambda p: shutil.rmtree(p / "adapter")), ["adapter", "step_000001"]),
    ("resume with a cut state", resume_spoiled(cut("state.pt")), ["state.pt has 1000 bytes", "step_000001"]),
    ("resume with no settings", resume_spoiled(remove("config.yaml")), ["config.yaml is missing", "step_000001"]),
    ("resume without manifest", resume_spoiled(remove("manifest.json")), ["manifest.json", "no whole checkpoint"]),
    ("requeued, damaged", resume_spoiled(cut("state.pt"), "auto"), ["state.pt has 1000 bytes", "no whole checkpoint"]),
]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, dream_dir, reward_dir) -> Path:
    """The output folder of a one-step run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    config = {
        "model": {"path": str(dream_dir)},
        "lora": {"r": 4},
        "data": {"path": str(folder / "prompts.txt"), "max_prompt_length": 16},
        "reward": {"path": str(reward_dir)},
        "guidance": {"kind": "none"},
        "rollout": {"num_generations": 2, "max_completion_length": 2, "steps": 1},
        "objective": {"name": "reinforce"},
        "tracking": {"wandb": False},
    }
    return go(config, folder, steps=1, prompts_per_device=1)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of change; nothing where there is no folder."""
    found = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def case(tiny, tmp_path, finished, monkeypatch) -> Command:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return Command(tiny, tmp_path, finished)


@pytest.fixture
def refuse(capfd) -> Callable[..., list[str]]:
    """Runs a command in this process, which must exit with code 2. Returns the lines on stderr."""

    def call(case: Command, main: Callable[[Config], object] = train) -> list[str]:
        _, path, *overrides = case.words()
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run(main, path, overrides)
        assert exit_.value.code == 2
        return capfd.readouterr().err.splitlines()

    return call


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_is_one_line_and_exit_code_2(change, words, case, refuse):
    change(case)
    before = contents(case.output)
    lines = refuse(case)
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert contents(case.output) == before
    assert before or not case.output.exists()


def test_a_reward_is_found_in_the_folder_that_a_run_is_started_from(case, refuse, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def brevity(p, c, r): return [float('nan')] * len(c)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    case.put("reward.functions", {"rewards_of_mine:brevity": 0.1})
    assert "reward 'brevity' is nan" in refuse(case)[-1]


@pytest.mark.parametrize(("rank", "local_rank", "lines"), [(0, 0, 1), (1, 1, 0), (8, 0, 1)])
def test_errors_are_printed_once_a_machine(case, refuse, monkeypatch, rank, local_rank, lines):
    case.put("run.steps", -1)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert len(refuse(case)) == lines


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[float('nan')] * len(c)", ["reward 'f' is nan", "{prompt!r}", "completion"]),
        ("[float('inf')] * len(c)", ["reward 'f' is inf", "{prompt!r}", "completion"]),
        ("[0.0]", ["reward 'f'", "(1,)", "2 completions"]),
        ("0.0", ["reward 'f'", "()", "2 completions"]),
        ("[[0.0]] * len(c)", ["reward 'f'", "(2, 1)", "2 completions"]),
        ("None", ["reward 'f'", "one number", "2 completions"]),
    ],
)
def test_bad_reward_stops_before_the_first_rollout(value, words, case, refuse):
    prompt = "the plot of this film"
    functions(f"def f(p, c, r): return {value}", "own_rewards:f")(case)
    data("one.txt", prompt)(case)
    case.config["data"].pop("eval_path")
    [message] = refuse(case)
    assert not [word for word in words if word.format(prompt=prompt) not in message], message
    assert message.startswith("error: ") and not case.output.exists()


@pytest.mark.slow
def test_command_prints_no_traceback(tiny, finished, tmp_path):
    cases = [
        (put("rollout.temprature", 1.0), {}, "`rollout.temperature`"),
        (dream(remove("*.safetensors")), {}, "no weights"),
        (occupy, {}, "already holds a run"),
        (put("run.steps", 1), {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
    ]
    started = []
    for change, environ, words in cases:
        folder = tmp_path / words.replace(" ", "_")
        folder.mkdir()
        case = Command(copy.deepcopy(tiny), folder, finished)
        case.put("run.output_dir", str(folder / "run"))
        change(case)
        started.append((start(TRAIN, *case.words(), **environ), case.output, contents(case.output), words))
    for process, output, before, words in started:
        [message] = finish(process, 2).splitlines()
        assert message.startswith("error: ") and words in message
        assert contents(output) == before and output.exists() == bool(before)


def test_settings_are_checked_before_anything_is_loaded(case, refuse):
    case.puts(model__path="/no/such/model", rollout__top_p=2)
    [message] = refuse(case)
    assert "top_p" in message and "/no/such/model" not in message


def test_evaluation_refuses_an_adapter_of_another_scale(case, refuse, tmp_path):
    case.resume(lora__alpha=64, data__eval_path=str(tmp_path / "prompts.jsonl"))
    [message] = refuse(case, evaluate)
    assert "`lora.alpha` was 32.0 and is now 64" in message


def test_processes_that_did_not_join_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="ACCELERATE_USE_CPU=true"):
        go(tiny, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_run_stopped_before_its_first_checkpoint_has_its_own_message(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    claim(tmp_path / "run", new_owner())
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="before its first checkpoint"):
        go(tiny, tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'
