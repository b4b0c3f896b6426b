"""Settings: what is read is what was written, and what cannot be is one line, before anything is touched."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import warnings

import jsonschema
import pytest
import yaml
from accelerate.state import AcceleratorState, PartialState
from checkpoints import REPO
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from training import changed, write

from rgrl.algo import resolve_algorithm
from rgrl.cli import main
from rgrl.config import (
    Config,
    ConfigError,
    GuidanceConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrackingConfig,
    as_yaml,
    check,
    load_config,
    to_dict,
)
from rgrl.config.describe import docs, json_schema, settings_help
from rgrl.config.explain import ALIASES, all_keys
from rgrl.config.kinds import SECTIONS
from rgrl.environment import check_numbers
from rgrl.rollout.guidance import guidance_at
from rgrl.runtime.launch import left_out
from rgrl.trainer import evaluate, sample, train

LEAVES = [key for keys in all_keys(SECTIONS).values() for key in keys]
NEEDED = "model: {path: a}\ndata: {path: b}\nreward: {path: c}\nrun: {output_dir: d}\n"

# Each line is a list of two aliases of the line before: a billion values in thirty lines.
BOMB = "b0: &b0 [x, x]\n" + "".join(f"b{i + 1}: &b{i + 1} [*b{i}, *b{i}]\n" for i in range(30))

# (a file's text, words of the message). `{...}` sections are laid over settings that work.
FILES = [
    # Keys
    ("rollouts: {steps: 4}", ["unknown key `rollouts`", "did you mean `rollout`?"]),
    ("rollout: {temprature: 1}", ["`rollout.temprature`", "`rollout.temperature`"]),
    ("learning_rate: 1e-4", ["unknown key `learning_rate`", "`optim.learning_rate`"]),
    ("run: {output_dir: d, learning_rate: 1}", ["`run.learning_rate`", "`optim.learning_rate`"]),
    ("lora_r: 8", ["unknown key `lora_r`", "`lora.r`"]),
    ("rollout: {max_new_tokens: 8}", ["`rollout.max_new_tokens`", "`rollout.max_completion_length`"]),
    ("num_train_epochs: 3", ["`run.steps`"]),
    ("report_to: wandb", ["`tracking.wandb`"]),
    ("steps: 3", ["`rollout.steps`", "`guidance.steps`", "`run.steps`"]),
    ("zebra: 3", ["unknown key `zebra`", "the sections are model, lora"]),
    ("optim: {zebra: 3}", ["`optim.zebra`", "`optim` has learning_rate, warmup_steps"]),
    ("1: 2", ["unknown key `1`"]),
    ("null: 2", ["unknown key `null`"]),
    ("? [a, b]\n: 2", ["line 1", "a key must be text"]),
    ("rollout:\n  steps: 4\n  top_k: 1\n  steps: 5", ["line 4", "'steps'", "line 2"]),
    ("lora: {r: 4}\nlora: {r: 8}", ["line 2", "'lora'", "line 1"]),
    # Values of another type
    ("model: some/model", ["`model` is a section", "'some/model'"]),
    ("model: [a]", ["`model` is a section", "['a']"]),
    ("run: {steps: 2.5}", ["`run.steps` must be a whole number, not '2.5'"]),
    ("run: {steps: 1e3}", ["`run.steps` must be a whole number"]),
    ("run: {steps: true}", ["`run.steps` must be a whole number, not 'true'"]),
    ("run: {steps: [3]}", ["`run.steps` must be a whole number, not ['3']"]),
    ("run: {steps: null}", ["`run.steps` must be a whole number, not 'null'"]),
    ("run: {steps: }", ["`run.steps` must be a whole number, not ''"]),
    ("run: {steps: " + "9" * 5000 + "}", ["`run.steps` must be a whole number", "5,002 characters"]),
    ("run: {steps: 2026-11-25}", ["`run.steps` must be a whole number"]),
    ("optim: {learning_rate: fast}", ["`optim.learning_rate` must be a number, not 'fast'"]),
    ("optim: {learning_rate: 1e-4 # x}", ["not valid YAML", "line 2"]),
    ("run: {steps: 1__0}", ["`run.steps` must be a whole number"]),
    ("optim: {learning_rate: 1 e-4}", ["`optim.learning_rate` must be a number"]),
    ("optim: {learning_rate: .}", ["`optim.learning_rate` must be a number"]),
    ("optim: {learning_rate: !!float 1e-4}\nlora: {r: !!binary aGk=}", ["not valid YAML", "line 2", "binary"]),
    ("lora: {r: !!python/object/apply:os.system [true]}", ["not valid YAML", "python/object"]),
    ("tracking: {wandb: maybe}", ["`tracking.wandb` must be true or false, not 'maybe'"]),
    ("tracking: {wandb: 1}", ["`tracking.wandb` must be true or false, not '1'"]),
    ("lora: {targets: q_proj}", ["`lora.targets` must be a list, not 'q_proj'"]),
    ("lora: {targets: [[q_proj]]}", ["`lora.targets.0` must be text"]),
    ("lora: {targets: []}", ["`lora.targets` is empty"]),
    ("reward: {path: c, functions: [a]}", ["`reward.functions` must be a mapping"]),
    ("reward: {path: c, functions: {a: b}}", ["`reward.functions.a` must be a number, not 'b'"]),
    ("reward: {path: c, settings: {f: 3}}", ["`reward.settings.f` must be a mapping, not '3'"]),
    ("objective: {settings: [a]}", ["`objective.settings` must be a mapping"]),
    ("objective: {settings: {a: 010}}", ["`objective.settings.a` must be a number in plain decimal", "'010'"]),
    ("objective: {settings: {a: [.nan]}}", ["`objective.settings.a` must be", "or text in quotes"]),
    ("reward: {path: {a: b}}", ["`reward.path` must be text"]),
    ("guidance: {kind: null}", ["`guidance.kind` must be one of none, expectation, aps, entrgi, not 'null'"]),
    ("guidance: {kind: EntRGi}", ["`guidance.kind` must be one of"]),
    ("model: {path: a, dtype: float16}", ["`model.dtype` must be one of float32, bfloat16, not 'float16'"]),
    ("model: {path: a, family: qwen}", ["`model.family` must be one of auto, dream, llada, a2d, or package."]),
    ("model: {path: a, quantize: fp4}", ["`model.quantize` must be one of none, nf4, int8, not 'fp4'"]),
    ("model: {path: a, attn_implementation: flex_attention}", ["`model.attn_implementation` must be one of sdpa"]),
    ("model: {path: a, shifted: 1}", ["`model.shifted` must be true or false, not '1'"]),
    ("model: {path: a, revision: ../main}", ["`model.revision` must be a branch, tag or commit of the Hub"]),
    ('reward: {path: a, revision: ""}', ["`reward.revision` must be a branch, tag or commit of the Hub"]),
    ("judge: {revision: main}", ["`judge.revision` (main) pins `judge.path`, which is not set"]),
    ("guidance: {revision: main}", ["`guidance.revision` (main) pins `guidance.path`, which is not set"]),
    ("model: {path: a, load_in_4bit: true}", ["`model.load_in_4bit`", "`model.quantize`"]),
    ("lora: {targets: ['*_proj']}", ["`lora.targets`: '*_proj' is not a regular expression"]),
    # Numbers that YAML 1.1 reads in another base
    ("run: {seed: 010}", ["`run.seed` must be a whole number in plain decimal", "'010'"]),
    ("run: {seed: 1:30}", ["`run.seed` must be a whole number in plain decimal", "'1:30'"]),
    ("run: {seed: 0x10}", ["`run.seed` must be a whole number in plain decimal"]),
    ("run: {seed: 0b11}", ["`run.seed` must be a whole number in plain decimal"]),
    ("optim: {learning_rate: 1:30.5}", ["`optim.learning_rate` must be a number in plain decimal"]),
    ("rollout: {temperature: 007}", ["`rollout.temperature` must be a number in plain decimal"]),
    # Limits
    ("rollout: {temperature: .nan}", ["`rollout.temperature` must be a number, not '.nan'"]),
    ("rollout: {temperature: .inf}", ["`rollout.temperature` must be a finite number"]),
    ("optim: {max_grad_norm: inf}", ["`optim.max_grad_norm` must be a finite number"]),
    ("optim: {learning_rate: 1e999}", ["`optim.learning_rate` must be a finite number"]),
    ("optim: {learning_rate: 0}", ["`optim.learning_rate` must be above 0"]),
    ("rollout: {top_p: 1.01}", ["`rollout.top_p` must be in (0, 1], not '1.01'"]),
    ("lora: {dropout: 1}", ["`lora.dropout` must be in [0, 1), not '1'"]),
    ("guidance: {eta_final: -0.1}", ["`guidance.eta_final` must be at least 0, not '-0.1'"]),
    ("guidance: {eta: 0}", ["`guidance.eta` must be above 0", "`guidance.kind: none`"]),
    ("guidance: {steps: 0}", ["`guidance.steps` must be at least 1", "`guidance.kind: none`"]),
    ("guidance: {share: 1.5}", ["`guidance.share` must be in [0, 1]"]),
    ("rollout: {steps: 0}", ["`rollout.steps` must be at least 1, not '0'"]),
    ("rollout: {steps: 9, max_completion_length: 8}", ["`rollout.steps` (9)", "`rollout.max_completion_length` (8)"]),
    ("rollout: {block_length: 3}", ["`rollout.block_length` (3)", "divide"]),
    ("rollout: {top_k: -1}", ["`rollout.top_k` must be at least 0"]),
    ("objective: {beta: -0.1}", ["`objective.beta` must be at least 0"]),
    ("run: {max_hours: -1}", ["`run.max_hours` must be at least 0"]),
    ("objective: {correction_max: -.inf}", ["`objective.correction_max` must be above 0"]),
    ("objective: {correction_min: 3}", ["`objective.correction_min` (3.0)", "(2.0)"]),
    ("lora: {r: 100000000}", ["`lora.r` must be at most 8,192"]),
    ("rollout: {num_generations: 1_000_000}", ["`rollout.num_generations` must be at most 4,096"]),
    ("rollout: {max_completion_length: 99999999999}", ["`rollout.max_completion_length` must be at most"]),
    ("run: {steps: 1000000000000000000000}", ["`run.steps` must be at most"]),
    ("run: {seed: 9223372036854775808}", ["`run.seed` must be below 9,223,372,036,854,775,808"]),
    ("run: {timeout_minutes: 1e300}", ["`run.timeout_minutes` must be at most"]),
    ("reward: {path: c, time_limit: 1e300}", ["`reward.time_limit` must be at most"]),
    ("objective: {draws: 1000000}", ["`objective.draws` must be at most 1,000"]),
    ("run: {prompts_per_device: 100000}\nrollout: {num_generations: 4096}", ["409,600,000 rows", "65,536"]),
    # Paths
    ('run: {output_dir: "a\\0b"}', ["`run.output_dir` must be text without NUL"]),
    ('model: {path: "\\ud800"}', ["`model.path` must be text in UTF-8"]),
    ("run: {output_dir: " + "x" * 300 + "}", ["`run.output_dir` must be a path of at most 255 bytes a name"]),
    ("run: {output_dir: " + "x/" * 3000 + "}", ["`run.output_dir` must be a path of at most"]),
    ("judge: {path: " + "é" * 200 + "}", ["`judge.path` must be a path of at most 255 bytes"]),
    # Files
    ("- a\n- b", ["must hold sections"]),
    ("just text", ["must hold sections", "'just text'"]),
    ("a: 1\n---\nb: 2", ["not valid YAML", "line 2"]),
    ("run: {steps: 3", ["not valid YAML"]),
    ("run:\n\tsteps: 3", ["not valid YAML", "line 2"]),
    ("run: {name: @x}", ["not valid YAML", "line 1"]),
    ("a: \x07", ["not valid YAML"]),
    ("[" * 5000, ["nested too deeply"]),
    ("a: &a {b: *a}", ["more than 100,000 values"]),
    ("a: &a [*a]", ["more than 100,000 values"]),
    (BOMB, ["more than 100,000 values"]),
    ("lora: *nowhere", ["not valid YAML", "nowhere"]),
    ("# " + "x" * 2_000_000, ["more than 1,000,000 bytes"]),
    ("extends: other.yaml", ["other.yaml", "settings.yaml extends", "no such file"]),
    ("extends: settings.yaml", ["extends itself"]),
    ("extends: [a, b]", ["there is no preset 'a'; there are countdown, gsm8k"]),
    ("extends: gsm-8K", ["settings.yaml: `extends`: there is no preset 'gsm-8K'; did you mean gsm8k?"]),
    ("extends: [gsm8k, sudoku]", ["there is no preset 'sudoku'; did you mean sudoku4?"]),
    ("extends: base", ["there is no preset 'base'", "a file is named with a slash, or with .yaml at its end"]),
    ("extends: [base.yaml, ./base]", ["no such file", "settings.yaml extends"]),
    ("extends: {a: b}", ["`extends` must be the path of a file, the name of a preset, or a list of these"]),
    ("extends: [gsm8k, [base.yaml]]", ["`extends` must be the path of a file", "['base.yaml']"]),
    ("extends: [gsm8k, null]", ["`extends` must be the path of a file", "'null'"]),
    ('extends: ""', ["`extends` must be the path of a file", "not ''"]),
    ('extends: ["gsm8k", ""]', ["`extends` must be the path of a file"]),
    ('extends: "a\\0"', ["there is no preset 'a\\x00'"]),
    ('extends: "a\\0.yaml"', ["must be text without NUL"]),
    ("extends: .", ["no such file"]),
    ("extends: " + "y" * 300, ["there is no preset 'yyy"]),
    ("extends: " + "y" * 300 + ".yaml", ["255 bytes"]),
    ("extends: [base.yaml, settings.yaml]", ["settings.yaml extends itself"]),
]  # fmt: skip

# (overrides, words of the message)
OVERRIDES = [
    (["run.steps", "4"], ["expected --section.key value, got 'run.steps'"]),
    (["--run.steps"], ["--run.steps needs a value"]),
    (["--run.steps", "--run.seed", "3"], ["--run.steps needs a value"]),
    (["--", "3"], ["expected --section.key value"]),
    (["--=3"], ["expected --section.key value"]),
    (["--.=3"], ["unknown key `.`"]),
    (["--run.", "3"], ["unknown key `run.`"]),
    (["--run", "3"], ["`run` is a section"]),
    (["--run.steps.more", "3"], ["`steps` is a value, not a section"]),
    (["--run.step", "3"], ["`run.step`", "`run.steps`"]),
    (["--lr", "3"], ["`optim.learning_rate`"]),
    (["--output-dir", "x"], ["`run.output_dir`"]),
    (["--run.steps", ""], ["`run.steps` must be a whole number, not ''"]),
    (["--run.steps", "three"], ["`run.steps` must be a whole number, not 'three'"]),
    (["--run.steps=0x3"], ["`run.steps` must be a whole number in plain decimal"]),
    (["--lora.targets", "q_proj"], ["`lora.targets` must be a list"]),
    (["--lora.targets", "[q_proj"], ["--lora.targets is not valid YAML"]),
    (["--reward.functions", "{a: 1, a: 2}"], ["--reward.functions", "'a'", "there already"]),
    (["--reward.functions.own.module:f", "much"], ["`reward.functions.own.module:f` must be a number, not 'much'"]),
    (["--run.output_dir", "z" * 256], ["`run.output_dir` must be a path"]),
    (["--model.path", "a\udc80"], ["`model.path` must be text in UTF-8"]),
    (["--" + "k" * 500, "1"], ["unknown key"]),
]


@pytest.fixture
def refused(monkeypatch, capfd, tmp_path):
    """Runs `rgrl train` in this process: it must print one line, exit with 2, and leave the folder as it was."""

    def call(*words: str) -> str:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "kept.txt").write_text("mine")
        before = sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["rgrl", "train", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            sys.exit(main())
        out, err = capfd.readouterr()
        assert exit_.value.code == 2 and not out
        assert len(err.splitlines()) == 1 and err.startswith("error: ") and len(err) < 800, err
        assert sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
        return err

    return call


def test_settings_of_ones_own_code_are_read_as_yaml_means_them_and_written_so(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        NEEDED + "objective:\n  settings: {a: 1, b: 1e-4, c: '5', d: true, e: no, f: [x, null, -.5], g: {h: .inf}, "
        "i: '1e-4', j: '~', k: '1:30', l: 'inf', m: 2026-11-25, n: '.nan', o: 'yes', p: ' 7'}"
    )
    own = ["--reward.settings.f.scale", "3", "--reward.settings.f.mode", "fast", "--reward.settings.g", "{x: [1]}"]
    config = load_config(path, [*own, "--objective.settings.a", "2.5"])
    assert config.reward.settings == {"f": {"scale": 3, "mode": "fast"}, "g": {"x": [1]}}
    listed = {"f": ["x", None, -0.5], "g": {"h": math.inf}, "i": "1e-4", "j": "~", "k": "1:30", "l": "inf"}
    first = {"a": 2.5, "b": 1e-4, "c": "5", "d": True, "e": False}
    last = {"m": "2026-11-25", "n": ".nan", "o": "yes", "p": " 7"}
    assert config.objective.settings == first | listed | last
    path.write_text(as_yaml(config))
    assert load_config(path) == config
    with pytest.raises(ConfigError, match=r"`objective.settings.a` must be true or false, a number"):
        ObjectiveConfig(settings={"a": object})


@pytest.mark.parametrize(("text", "words"), FILES, ids=[text[:40] for text, _ in FILES])
def test_bad_file(text, words, tmp_path, refused):
    (tmp_path / "base.yaml").write_text(NEEDED)
    extends = "" if text.startswith(("extends", "- ", "just", "[")) else "extends: base.yaml\n"
    # Lines are counted from the case's own first one.
    path = tmp_path / "settings.yaml"
    path.write_text(f"{text}\n{extends}", encoding="utf-8", errors="surrogatepass")
    line = refused("--config", str(path))
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize(("overrides", "words"), OVERRIDES, ids=[" ".join(o)[:40] for o, _ in OVERRIDES])
def test_bad_override(overrides, words, tmp_path, refused):
    (tmp_path / "settings.yaml").write_text(NEEDED)
    line = refused("--config", "settings.yaml", *overrides)
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing.yaml", ["missing.yaml: no such file"]),
        (".", ["no such file"]),
        ("kept.yaml/below.yaml", ["no such file"]),
        ("w" * 300, ["255 bytes"]),
        ("a\0b", ["NUL"]),
        ("/dev/null", ["no such file"]),
        ("latin.yaml", ["latin.yaml", "not text in UTF-8"]),
        ("binary.yaml", ["binary.yaml", "not valid YAML"]),
    ],
)
def test_bad_path_of_the_file(path, words, tmp_path, refused):
    (tmp_path / "kept.yaml").write_text(NEEDED)
    (tmp_path / "latin.yaml").write_bytes(b"run: {output_dir: caf\xe9}")
    (tmp_path / "binary.yaml").write_bytes(b"\0\1\2")
    line = refused("--config", path)
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE", "'two'"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE", "from 1, not '0'"]),
        ({"RANK": "1.0"}, ["RANK", "'1.0'"]),
        ({"RANK": "3", "WORLD_SIZE": "2"}, ["RANK (3)", "WORLD_SIZE (2)"]),
        ({"LOCAL_RANK": "-7"}, ["LOCAL_RANK", "'-7'"]),
        ({"LOCAL_WORLD_SIZE": "1e3"}, ["LOCAL_WORLD_SIZE", "'1e3'"]),
        ({"MASTER_PORT": "70000", "WORLD_SIZE": "2"}, ["MASTER_PORT", "'70000'"]),
        ({"WORLD_SIZE": "9" * 400}, ["WORLD_SIZE"]),
        ({"ACCELERATE_USE_CPU": "perhaps"}, ["cannot join as the launcher says", "perhaps"]),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["DeepSpeed is not supported"]),
    ],
    ids=str,
)
def test_bad_environment(variables, words, tmp_path, refused, monkeypatch):
    for state in (PartialState, AcceleratorState):  # as in a process that has not joined yet
        monkeypatch.setattr(state, "_shared_state", {})
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = refused("--config", str(write(yaml.safe_load(NEEDED), tmp_path)))
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "HF_HUB_DOWNLOAD_TIMEOUT"])
def test_bad_environment_that_libraries_read_as_they_are_loaded(name, tmp_path):
    (tmp_path / "settings.yaml").write_text(NEEDED)
    code = (
        "import sys; sys.argv[1:] = ['train', '--config', 'settings.yaml']; from rgrl.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {name: "soon"}, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-2000:]
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and name in line and "'soon'" in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize("text", ["--5", " ", "²", "\u0661", "9" * 5000, "1_0", "+"])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "OMP_NUM_THREADS"])
def test_what_looks_like_a_number_in_the_environment(name, text):
    with pytest.raises(ConfigError, match=f"^the environment variable {name} must be a whole number from -?[01], not "):
        check_numbers({name: text})


def test_a_scheduler_that_says_nonsense_is_not_believed():
    assert left_out({"SLURM_NTASKS": "9" * 5000, "SLURM_STEP_NUM_TASKS": "²"}, 1) is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("$NO_SUCH_VARIABLE/a.yaml", ["--config", "NO_SUCH_VARIABLE is not set"]),
        ("~nobody-here/a.yaml", ["--config", "there is no user '~nobody-here'"]),
        ("x" * 300, ["at most 255 bytes"]),
    ],
)
def test_paths_that_cannot_be_written_out(path, words, refused):
    line = refused("--config", path)
    assert not [word for word in words if word not in line], line


def test_paths_of_files_of_settings_are_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINE", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.yaml").write_text(NEEDED)
    (tmp_path / "b.yaml").write_text("extends: ${MINE}/a.yaml")
    assert load_config("~/b.yaml") == load_config("$MINE/a.yaml")


# ------------------------------------------------------------------------------------ what is read as it is written
PLAIN = ["2026_11_25", "1.50", "007", "12:30", "yes", "1e5", "0x10", "2026-11-25", "0.0.1", "-3", "+1"]
OTHERWISE = ["run #3", "~x", "[a]", "a: b", '"q"', " x ", "*a", "- a"]  # plain text in YAML, or not at all


@pytest.mark.parametrize("text", PLAIN + OTHERWISE)
def test_text_is_taken_literally(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(NEEDED)
    words = ["--run.output_dir", text, f"--tracking.name={text}", "--data.column", text]
    config = load_config(path, words)
    assert (config.run.output_dir, config.tracking.name, config.data.column) == (text, text, text)
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(saved) == config
    if text in PLAIN:
        path.write_text(NEEDED + f"tracking: {{name: {text}}}\njudge:\n  path: {text}\n")
        assert load_config(path).tracking.name == load_config(path).judge.path == text


def test_null_is_no_value_only_where_there_may_be_none(tmp_path):
    path = tmp_path / "c.yaml"
    for null in ("null", "~", "", "NULL"):
        path.write_text(
            NEEDED + f"judge: {{path: {null}}}\nguidance: {{eta_final: {null}}}\ntracking: {{name: '{null}'}}"
        )
        config = load_config(path, ["--run.resume_from_checkpoint", null, "--data.split", null])
        assert config.judge.path is config.guidance.eta_final is config.run.resume_from_checkpoint is None
        assert config.data.split == null and config.tracking.name == null


def test_numbers_are_read_as_people_write_them(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        NEEDED + "optim: {learning_rate: 1e-5, weight_decay: .5, warmup_steps: +3, max_grad_norm: 1_000}\n"
        "objective: {correction_max: .inf, beta: 1.}\nlora: {alpha: '16', r: 8}\ntracking: {wandb: No}\n"
        "rollout: {temperature: 1E0}\nguidance:\n"
    )
    c = load_config(path, ["--run.seed", "-4", "--reward.functions.own.f:g", "1", "--lora.targets", "[q_proj, 'on']"])
    assert (c.optim.learning_rate, c.optim.weight_decay, c.optim.warmup_steps) == (1e-5, 0.5, 3)
    assert (c.objective.correction_max, c.objective.beta, c.optim.max_grad_norm) == (math.inf, 1.0, 1000)
    assert (c.lora.alpha, c.lora.r, c.tracking.wandb, c.rollout.temperature) == (16.0, 8, False, 1.0)
    assert (c.run.seed, c.reward.functions, c.lora.targets) == (-4, {"own.f:g": 1.0}, ["q_proj", "on"])


def test_a_file_may_use_anchors_and_merges(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(NEEDED + "lora: &x {r: 4}\njudge: {<<: {path: e}, dtype: bfloat16}\n")
    config = load_config(path)
    assert (config.lora.r, config.judge.path, config.judge.dtype) == (4, "e", "bfloat16")


def test_aliases_name_settings_that_exist():
    assert set(ALIASES.values()) <= set(LEAVES)
    # A name that rgrl has itself needs no alias.
    assert not ALIASES.keys() & {key.split(".")[1] for key in LEAVES} - {"epsilon_high"}


# ---------------------------------------------------------------------------------------------- made in Python
@pytest.mark.parametrize(
    "make",
    [
        lambda: GuidanceConfig(kind="entrgy"),
        lambda: RolloutConfig(temperature=-1),
        lambda: RolloutConfig(max_completion_length=8, steps=9),
        lambda: RolloutConfig(max_completion_length=8, steps=8, block_length=3),
        lambda: GuidanceConfig(top_n=1),
        lambda: ObjectiveConfig(correction_min=3.0),
        lambda: RunConfig(steps=True),
        lambda: RunConfig(output_dir=3),
        lambda: LoraConfig(rank=3),
        lambda: LoraConfig(4, 8, 2.0),
        lambda: RewardConfig(functions={"a:b": math.nan}),
        lambda: TrackingConfig(wandb=None),
        lambda: Config(model="x"),
        lambda: Config(rollout={"steps": 0}),
        lambda: dataclasses.replace(RolloutConfig(), top_p=0.0),
    ],
)
def test_a_bad_section_cannot_be_made(make):
    with pytest.raises(ConfigError) as error:
        make()
    assert "\n" not in str(error.value) and "`" in str(error.value)


@pytest.mark.parametrize("command", [train, evaluate, lambda config: list(sample(config))])
def test_commands_as_functions_check_what_they_are_handed(command, tmp_path):
    needed = {"model": ModelConfig("m"), "run": RunConfig(str(tmp_path / "run"))}
    with pytest.raises(ConfigError, match=r"`data.path` is required"):
        command(Config(**needed, reward=RewardConfig("r")))
    config = load_config(REPO / "recipes/reviews/rgrl.yaml", ["--run.output_dir", str(tmp_path / "run")])
    config.rollout.temperature = -1.0
    with pytest.raises(ConfigError, match=r"`rollout.temperature` must be at least 0, not -1.0"):
        command(config)
    assert not (tmp_path / "run").exists()


def test_a_fade_to_no_guidance_is_legal_to_its_end():
    config = Config(guidance=GuidanceConfig(eta_final=0.0), run=RunConfig(steps=5))
    last = guidance_at(config, 4)
    assert (last.eta, last.kind) == (0.0, "none")
    check(dataclasses.replace(load_config(REPO / "recipes/reviews/guided.yaml"), guidance=last))


# ------------------------------------------------------------------------------------------------ any input at all
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.binary(max_size=5)
)
KEYS = st.one_of(
    st.sampled_from(sorted({part for key in LEAVES for part in key.split(".")} | ALIASES.keys())),
    st.text(max_size=8),
    st.integers(),
    st.none(),
)
TREES = st.recursive(SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3))
SECTION = st.dictionaries(KEYS, TREES, max_size=3)
FAST = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def valid_or_one_line(load) -> None:
    try:
        config = load()
    except ConfigError as error:
        assert str(error) and len(str(error)) < 2000
    else:
        check(config)


@FAST
@given(tree=st.dictionaries(st.sampled_from(list(SECTIONS)) | KEYS, SECTION | TREES, max_size=4))
@example(tree={"run": {"output_dir": "\ud800"}})
def test_any_tree_is_a_valid_config_or_one_line(tree, tmp_path):
    path = tmp_path / "tree.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=False))
    valid_or_one_line(lambda: load_config(path))


@FAST
@given(text=st.text(alphabet=st.sampled_from(list("ab:-{}[],&*!|>'\"#%@`?~ \n\t0.")) | st.characters(), max_size=60))
def test_any_text_is_a_valid_config_or_one_line(text, tmp_path):
    path = tmp_path / "text.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    valid_or_one_line(lambda: load_config(path))


@FAST
@given(words=st.lists(st.sampled_from([f"--{key}" for key in LEAVES]) | st.text(max_size=12), max_size=6))
def test_any_override_gives_a_valid_config_or_one_line(words, tmp_path):
    path = tmp_path / "needed.yaml"
    path.write_text(NEEDED)
    valid_or_one_line(lambda: load_config(path, words))


@FAST
@given(key=st.sampled_from(LEAVES), value=st.text(max_size=12) | st.integers().map(str) | st.floats().map(str))
def test_any_value_of_a_known_setting(key, value, tmp_path):
    path = tmp_path / "needed.yaml"
    path.write_text(NEEDED)
    valid_or_one_line(lambda: load_config(path, [f"--{key}={value}"]))


# --------------------------------------------------------------------------------------------- recipes and editors
def test_what_an_earlier_run_wrote_loads_as_it_was(tmp_path, tiny):
    tiny = changed(
        tiny, objective={"correction": "truncate", "correction_max": math.inf}, optim={"learning_rate": 1e-5}
    )
    config = load_config(write(tiny, tmp_path))
    written = tmp_path / "written.yaml"
    written.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    assert load_config(written) == config


def test_help_and_schema_know_every_setting():
    text, schema = settings_help(), json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for key in LEAVES:
        section, name = key.split(".")
        assert f"--{key}  " in text and docs()[section][name]
        assert schema["$defs"][SECTIONS[section].__name__]["properties"][name]["description"] == docs()[section][name]


def test_shipped_recipes_fit_the_shipped_schema():
    shipped = REPO / "docs" / "settings.schema.json"
    assert json.loads(shipped.read_text()) == json_schema(), (
        "write it anew: rgrl schema --output docs/settings.schema.json"
    )
    validator = jsonschema.Draft202012Validator(json_schema())
    recipes = sorted(REPO.glob("recipes/*/*.yaml"))
    for path in recipes:
        validator.validate(yaml.safe_load(path.read_text()))
        named = path.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
        assert (path.parent / named).resolve() == shipped.resolve()
    assert len(recipes) >= 5
    assert not validator.is_valid({"rollout": {"temperature": -1}}) and not validator.is_valid({"rollout": {"x": 1}})


def test_settings_are_read_fast():
    """The import of the settings, in processor seconds of a fresh process, against that of pydantic alone."""

    def seconds(module: str) -> float:
        code = f"import time; start = time.process_time(); import {module}; print(time.process_time() - start)"
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(3)]
        return min(float(run.stdout) for run in runs)

    assert seconds("rgrl.config") < 4 * seconds("pydantic, yaml")


MINIMAL = "model: {path: m}\ndata: {path: d}\nrun: {output_dir: o}\nreward: {path: r}\n"
OLD = {  # a setting of release 0.1.0 and a value -> the line that refuses it, or None where the value did nothing
    ("gradient.loss", "distil"): "`gradient.loss` was removed in 0.2.0",
    ("gradient.loss", "first_order"): None,
    ("gradient.eta", "0.25"): None,
    ("gradient.centre", "row"): "`gradient.centre` was removed in 0.2.0",
    ("gradient.centre", "none"): None,
    ("gradient.marginal", "1e-3"): "`gradient.marginal` was removed in 0.2.0",
    ("gradient.marginal", "0.0"): None,
    ("gradient.marginal", "0"): None,
    ("gradient.reuse", "true"): "`gradient.reuse` was removed in 0.2.0",
    ("gradient.reuse", "false"): None,
    ("gradient.reuse", "No"): None,
    ("gradient.measure_steps", "1"): None,
}


@pytest.mark.parametrize(("key", "value"), OLD)
@pytest.mark.parametrize("given", ["file", "override", "extended"])
def test_settings_that_were_removed_name_the_release_that_has_them(tmp_path, key, value, given):
    (section, _, name), line = key.partition("."), OLD[key, value]
    text = f"{section}: {{{name}: {value}}}\n" if given != "override" else ""
    (tmp_path / "a.yaml").write_text(MINIMAL + text)
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    path = tmp_path / ("b.yaml" if given == "extended" else "a.yaml")
    words = [f"--{key}", value] if given == "override" else []
    if line is None:
        assert name not in to_dict(load_config(path, words))[section]
        return
    with pytest.raises(ConfigError, match=re.escape(line)) as error:
        load_config(path, words)
    assert "release 0.1.0 (commit cc2d4ec)" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "text", "words", "expected"),
    [
        ("", "objective: {iterations: 3}", [], 3),
        ("", "objective: {iterations: 3}\noptim:", [], 3),
        ("", "objective: {iterations: 3}", ["--objective.iterations", "5"], 5),
        ("", "objective: {iterations: 3}", ["--optim.updates", "6"], 6),
        ("", "optim: {updates: 3}", ["--objective.iterations", "5"], 5),
        ("objective: {iterations: 3}", "", [], 3),
        ("objective: {iterations: 3}", "objective: {iterations: 4}", ["--objective.iterations=5"], 5),
        ("optim: {updates: 3}", "objective: {iterations: 4}", [], 4),
        ("objective: {iterations: 3}", "optim: {updates: 4}", [], 4),
        ("", "objective: {iterations: 3}\noptim: {updates: +3}", [], 3),
        ("", "objective: {iterations: 3}\noptim: {updates: 4}", [], "`objective.iterations` ('3') is called"),
        ("", "", ["--optim.updates=4", "--objective.iterations=5"], "the command line: `objective.iterations` ('5')"),
        ("", "", ["--objective.iterations=5", "--optim.updates=4"], "the command line: `objective.iterations` ('5')"),
        ("", "objective: {iterations: 3}\noptim: fast", [], "`optim` is a section with keys of its own"),
        ("", "objective: {iterations: 0}", [], "`optim.updates` must be at least 1"),
    ],
)
def test_the_number_of_updates_has_an_older_name(base, text, words, expected, tmp_path):
    """It warns once, however often the older name is used."""
    (tmp_path / "base.yaml").write_text(MINIMAL + base)
    (tmp_path / "a.yaml").write_text(f"extends: base.yaml\n{text}\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(expected, str):
            with pytest.raises(ConfigError, match=re.escape(expected)) as error:
                load_config(tmp_path / "a.yaml", words)
            assert "\n" not in str(error.value)
            return
        config = load_config(tmp_path / "a.yaml", words)
    assert config.optim.updates == expected and "iterations" not in as_yaml(config)
    assert [str(one.message) for one in caught] == ["`objective.iterations` is called `optim.updates` now"]


def test_a_removed_objective_names_the_release_that_has_it():
    with pytest.raises(ConfigError, match=r"`objective.name: hybrid` was removed in 0.2.0"):
        resolve_algorithm(Config(objective=ObjectiveConfig(name="hybrid")))
