"""The command line: every command, its errors in one line, what it prints where, and what it need not import."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from checkpoints import REPO, write_reward
from processes import ENV, finish, launch_file, start
from training import changed, go, write

import rgrl
from rgrl import cli, doctor
from rgrl.config import load_config
from rgrl.errors import REQUEUE, RunStoppedError
from rgrl.header import processes, short
from rgrl.tracking import read_metrics, report

COMMANDS = ["train", "sample", "evaluate", "data", "report", "judge", "export", "presets", "schema", "doctor"]
HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "wandb")


@pytest.fixture
def call(monkeypatch, capfd) -> Callable[..., tuple[str, str]]:
    """Run a command in this process, which must exit with `code`. Returns what it printed to stdout and to stderr."""

    def command(*words: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "path", [*sys.path])
        capfd.readouterr()
        ended = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as exit_:
            ended = exit_.code
        printed = capfd.readouterr()
        assert ended == code, printed.err
        return printed.out, printed.err

    return command


def one_error(printed: tuple[str, str]) -> str:
    out, err = printed
    assert not out and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    return err


# ------------------------------------------------------------------------------------------------ what needs no torch
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["schema"], 0),
        (["train", "--config", "no such file"], 2),
        (["report", "{run}"], 0),
    ],
)
def test_light_commands_load_nothing_heavy(words, code, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    words = [word.format(run=tmp_path) for word in words]
    script = (
        "import sys, rgrl.cli\ntry: rgrl.cli.main(sys.argv[1:])\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == code and done.stderr.splitlines()[-1] == "[]", done.stderr


def test_help_lists_the_commands_and_every_setting(call):
    out, _ = call("--help")
    assert [re.match(r"  rgrl (\w+)", line)[1] for line in out.splitlines() if line.startswith("  rgrl ")] == COMMANDS
    for name in COMMANDS:
        printed, _ = call(name, "--help")
        assert printed.startswith(f"usage: rgrl {name}")
        assert ("--optim.max_grad_norm" in printed) == (name in ("train", "sample", "evaluate", "data"))
    assert call("--version") == (f"rgrl {rgrl.__version__}\n", "")
    assert call(code=2) == ("", out)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], ["'trian'", "`train`"]),
        (["--config", "mine.yaml"], ["unknown command '--config'", "doctor"]),
        (["train"], ["--config FILE is missing"]),
        (["evaluate", "--run.steps", "1"], ["--config FILE is missing"]),
        (["sample", "--config"], ["--config needs a file"]),
        (["train", "--config", "--run.steps", "1"], ["--config needs a file"]),
        (["train", "--config=/no/such.yaml"], ["/no/such.yaml", "no such file"]),
        (["data", "--config", "a.yaml", "--first", "-1"], ["--first", "a whole number from 0, not '-1'"]),
        (["report"], ["RUN"]),
        (["report", "a", "b"], ["unrecognized arguments: b"]),
        (["judge", "a"], ["required: --judge"]),
        (["judge", "--judge", "a"], ["required: RUN"]),
        (["judge", "a", "--judge", "b", "--batch", "0"], ["--batch", "a whole number from 1, not '0'"]),
        (["judge", "a", "--judge", "b", "--max-length", "-1"], ["--max-length", "a whole number from 0, not '-1'"]),
        (["judge", "a", "--judge", "b", "--dtype", "int8"], ["--dtype", "float32"]),
        (["judge", "/no/such/run", "--judge", "b"], ["/no/such/run: no such folder"]),
        (["schema", "--output", "/no/such/folder/file"], ["/no/such/folder/file", "No such file"]),
        (["doctor", "now"], ["unrecognized arguments: now"]),
    ],
)
def test_a_bad_command_line_is_one_line(words, told, call):
    message = one_error(call(*words, code=2))
    assert not [word for word in told if word not in message], message


def test_overrides_go_to_the_settings_as_they_are():
    words = ["--tracking.name", "-h", "--config=a=b.yaml", "--optim.learning_rate", "-1e-4", "--run.seed=3", "odd"]
    assert cli.split(words) == ("a=b.yaml", [word for word in words if not word.startswith("--config")])
    assert cli.split(["--run.steps", "--config", "file"]) == ("file", ["--run.steps"])
    assert cli.split(["--config", "file", "-h"]) is None


def test_the_schema_is_printed_or_written(call, tmp_path):
    out, _ = call("schema")
    assert json.loads(out)["properties"].keys() >= {"model", "run"}
    assert call("schema", "--output", tmp_path / "schema.json") == ("", "")
    assert (tmp_path / "schema.json").read_text() == out


def test_nothing_is_said_about_a_reader_that_has_gone():
    command = f"{sys.executable} -m rgrl schema | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=REPO)
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------------------- report
def lines_of(*lines: dict) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def put_table(folder: Path, step: int, *completions: str) -> None:
    (folder / "completions").mkdir(exist_ok=True)
    rows = [
        {"index": i, "prompt": f"prompt {i}", "completion": text, "reward": step + 0.5}
        for i, text in enumerate(completions)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "completions" / f"eval_{step:06d}.parquet")


START = {"step": 0, "eval/reward": -1.0, "eval/reward_std": 2.0, "eval/judge": None}
END = {"step": 3, "reward": 0.25, "eval/reward": 0.5, "time/rollout": 7.4}


@pytest.mark.parametrize(
    ("metrics", "told", "untold"),
    [
        ("", ["step 0\n", "no step has been logged yet"], ["plot:", "seconds:"]),
        (lines_of(START), ["step 0", "-1.000"], ["sd)", "seconds:", "eval/judge"]),
        (lines_of({"step": 1, "reward": 0.25}), ["no evaluation", "0.250"], ["seconds:"]),
        (lines_of(START, END), ["-1.000       0.500   (+0.75 of its starting sd)", "seconds: rollout 7\n"], ["judge"]),
        (lines_of(START, END)[:-9], ["step 0", "-1.000"], ["0.500"]),
        (lines_of(START | {"eval/reward": None}, {"step": 1, "reward": None}), ["no step"], ["plot:"]),
    ],
    ids=["nothing yet", "evaluated once", "never evaluated", "finished", "torn", "not finite"],
)
def test_a_report_of_what_there_is(metrics, told, untold, call, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(metrics)
    out, err = call("report", tmp_path)
    assert (
        not err and not [word for word in told if word not in out] and not [word for word in untold if word in out]
    ), out
    drawn = ["reward.png"] if "plot:" in out else []
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", *drawn]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: run.rmdir(), "no such folder"),
        (lambda run: (run.rmdir(), run.write_text("")), "not a folder"),
        (lambda run: None, "holds no run: it has no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").mkdir(), "Is a directory"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe{}\n"), "line 1 cannot be read"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n\n"), "lines 1, 2 cannot be read"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "reward": "high"}\n'), "nothing remains"),
    ],
)
def test_what_is_no_run_is_named_in_one_line(spoil, told, call, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    spoil(run)
    assert told in one_error(call("report", run, code=2))


def test_samples_stand_side_by_side_and_end_with_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    put_table(tmp_path, 0, "short", "only before")
    assert report.before_and_after(tmp_path).splitlines()[1] == "  now      0.50  short"
    put_table(tmp_path, 3, "word\n" * 100)
    put_table(tmp_path, 20, " ".join(["word"] * 100))
    first, before, *after = report.before_and_after(tmp_path).splitlines()
    assert (first, before, after[0][:17]) == ("[prompt 0]", "  before   0.50  short", "  after   20.50  ")
    assert len(after) == 6 and max(map(len, after)) <= 40 and after[-1].endswith("[...]")
    (tmp_path / "completions" / "eval_000020.parquet").write_bytes(b"PAR1")
    assert "cannot be read" in report.before_and_after(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_in) -> tuple[dict, Path]:
    """The settings and the output folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    settings = tiny_in(folder)
    return settings, go(settings, folder)


def test_the_report_of_a_run_draws_its_plot_anew(finished, call, tmp_path):
    output = shutil.copytree(finished[1], tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    out, _ = call("report", output)
    assert out.startswith(f"{output}: step 2 of 2\n") and "before" in out and "after" in out
    assert out.endswith(f"plot: {output / 'reward.png'}\nadapter: {output / 'checkpoints/step_000002/adapter'}\n")
    assert (output / "reward.png").read_bytes().startswith(b"\x89PNG")
    (output / "reward.png").unlink()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    out, _ = call("report", output, "--output", tmp_path / "plot.png")
    assert f"plot: {tmp_path / 'plot.png'}\n" in out and not (output / "reward.png").exists()
    assert "ends with .png" in one_error(call("report", output, "--output", tmp_path / "plot.pdf", code=2))
    assert "--output" in one_error(call("report", output, "--output", tmp_path / "none" / "plot.png", code=2))


# -------------------------------------------------------------------------------------------------------------- judge
def test_the_runs_own_judge_says_again_what_it_said(finished, call, judge_dir, tmp_path):
    """Whatever the batches, and where prompts are cut too: as many tokens are kept free for completions."""
    settings, _ = finished
    settings = changed(settings, judge={"max_length": 13}, run={"steps": 2, "eval_steps": 1})
    output = go(settings, tmp_path)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    words = ["judge", output, "--judge", judge_dir, "--max-length", 13, "--batch", 3, "--output", tmp_path / "x.csv"]
    out, err = call(*words)
    lines = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [int(line["step"]) for line in lines] == [0, 1, 2] and "judging 11/12" in err
    logged = {line["step"]: line for line in read_metrics(output / "metrics.jsonl")}
    for line in lines:
        assert float(line["new"]) == pytest.approx(logged[int(line["step"])]["eval/judge"], abs=1e-5)
        assert float(line["judge_half"]) == pytest.approx(float(line["new_half"]), abs=1e-4) and line["n"] == "4"
        assert float(line["reward"]) == pytest.approx(logged[int(line["step"])]["eval/reward"], abs=1e-5)
        change = "" if line["step"] == "0" else pytest.approx(float(line["new"]) - float(lines[0]["new"]), abs=1e-6)
        assert (line["change"] and float(line["change"])) == change
    cut = sum(line["eval/judge_cut"] for line in logged.values())
    assert cut > 0 and f"\n{cut:.0f} texts were too long for this judge" in out
    assert re.search(r"\n     2      4 +-?\d\.\d\d ± \d\.\d\d .*[+-]\d\.\d\d ± \d\.\d\d\n", out)
    assert "is overwritten" in one_error(call(*words, code=2))
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def spoilt_table(content: bytes | dict) -> Callable[[Path], object]:
    """Put a table of another evaluation into a run's folder: these columns, or these bytes."""

    def put(run: Path) -> None:
        path = run / "completions" / "eval_000003.parquet"
        path.write_bytes(content) if isinstance(content, bytes) else pq.write_table(pa.table(content), path)

    return put


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: (shutil.rmtree(run), run.write_text("")), "not a folder"),
        (lambda run: shutil.rmtree(run / "completions"), "no completions/eval_*.parquet"),
        (spoilt_table(b"PAR1"), "eval_000003.parquet cannot be read"),
        (spoilt_table({"index": [1], "text": ["a"]}), "it has no column 'prompt'"),
        (spoilt_table({"index": [1], "prompt": ["a"], "completion": [None]}), "None in the column 'completion'"),
        (spoilt_table({"index": pa.array([], pa.int64())}), "holds no completions"),
    ],
)
def test_what_cannot_be_judged_is_named_before_a_judge_is_loaded(spoil, told, call, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    put_table(run, 0, "a completion")
    spoil(run)
    assert told in one_error(call("judge", run, "--judge", tmp_path / "no judge", code=2))


def test_what_is_no_judge_is_named(call, tmp_path, dream_dir, reward_dir):
    put_table(tmp_path, 0, "a completion")
    two = write_reward(tmp_path / "two", labels=2)
    for words, told in (
        ([tmp_path / "none"], "no such folder"),
        ([dream_dir], "no class of transformers"),
        ([two], "has 2 labels"),
        ([reward_dir, "--max-length", 999], "more than the 128 tokens"),
        ([reward_dir, "--adapter", two], "no adapter_config.json there"),
        ([reward_dir, "--output", tmp_path / "x.txt"], "ends with .csv"),
        ([reward_dir, "--output", tmp_path / "none" / "x.csv"], "there is no folder"),
        ([reward_dir, "--output", tmp_path / "completions"], "ends with .csv"),
    ):
        assert told in one_error(call("judge", tmp_path, "--judge", *words, code=2))


def test_a_run_without_settings_scores_or_a_second_prompt_is_judged_too(call, tmp_path, reward_dir):
    put_table(tmp_path, 7, "one completion")
    out, err = call("judge", tmp_path, "--judge", reward_dir)
    assert "config.yaml does not tell the length of completions" in err
    assert re.search(r"\n     7      1 +7.50 +- +-?\d\.\d\d +-\n", out), out


def test_judging_is_for_one_process(call, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "judging runs in one process, and 2" in one_error(call("judge", tmp_path, "--judge", "x", code=2))


# --------------------------------------------------------------------------------------------- train, evaluate, sample
def test_a_run_begins_with_a_header_and_its_bar_moves_during_evaluations(tiny, tmp_path, call):
    config = write(changed(tiny, guidance={"share": 0.5}, objective={"correction": "truncate"}), tmp_path)
    out, err = call("train", "--config", config, "--run.steps", 1)
    first, second, learned, third, reward, judge, fourth, *bar = err.splitlines()
    where = f"rgrl {rgrl.__version__} | {processes(Accelerator())} | "
    assert first == f"{where}policy dream, 278K parameters, 3.7K trainable (LoRA r 4)"
    assert second == "4 rows a step (2 prompts x 2 completions), 50 % guided by entrgi | steps 1 ... 1"
    assert learned == "learning from reinforce with zscore advantages, KL 0.01 | 1 update a rollout"
    assert third == f"{tmp_path / 'run'} | W&B off" and fourth.startswith("correcting for guidance")
    assert reward == "reward model model, Qwen3ForSequenceClassification: scores, guides, each prompt is computed once"
    assert judge == "reward model judge, Qwen3ForSequenceClassification: judges"
    assert "0/1 [00:00<?, ?step/s, evaluating 0/4]" in "\n".join(bar)
    assert out.startswith("\nunguided, held-out prompts") and "adapter: " in out
    resume = ["--config", config, "--run.resume_from_checkpoint", "latest"]
    assert "| steps 2 ... 2\n" in call("train", *resume)[1]
    assert "| all 2 steps are done\n" in call("train", *resume)[1]


def test_sizes_are_short():
    assert [short(n) for n in (7, 1000, 278016, 5_200_000, 7_615_616_512)] == ["7", "1K", "278K", "5.2M", "7.6B"]


def test_results_alone_are_on_stdout(finished, tmp_path, call):
    settings, output = finished
    config = write(changed(settings, run={"output_dir": str(output)}), tmp_path)
    out, err = call("evaluate", "--config", config, "--run.resume_from_checkpoint", "latest")
    assert json.loads(out)["eval/reward"] and "evaluating 0/4" in err
    assert bool(json.loads(out)["eval/top_word"]) == ("(eval/top_word): " in err)
    assert f"adapter: {output / 'checkpoints' / 'step_000002'}" in err
    out, err = call("sample", "--config", config)
    assert len([json.loads(line) for line in out.splitlines()]) == 8 and "the base model" in err


def test_a_run_that_stops_says_so_once(tiny, tmp_path, capfd):
    def stop(message: str, code: int) -> str:
        def raise_it(config) -> None:
            raise RunStoppedError(message, code)

        with pytest.raises(SystemExit) as exit_:
            cli.run(raise_it, str(write(tiny, tmp_path)), [])
        assert exit_.value.code == code
        return capfd.readouterr().err

    assert stop("stopped at step 3 on SIGTERM; all is saved", REQUEUE) == "stopped at step 3 on SIGTERM; all is saved\n"
    assert stop("cannot write x", 1) == "error: cannot write x\n"


def test_the_working_folder_hides_no_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), "/somewhere"])
    cli.working_folder_last()
    assert sys.path == ["/somewhere", str(tmp_path)]


# ------------------------------------------------------------------------------------------------------------- doctor
def test_the_self_test_notices_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.tempfile, "tempdir", str(tmp_path))
    train = doctor.train

    def with_another_step_size(config):
        resumed = config.run.resume_from_checkpoint is not None
        return train(replace(config, guidance=replace(config.guidance, eta=50.0)) if resumed else config)

    monkeypatch.setattr(doctor, "train", with_another_step_size)
    assert "another adapter" in doctor.self_test()[0]
    monkeypatch.setattr(doctor, "train", lambda config: load_config("/no/such/file"))
    assert doctor.self_test()[0].startswith("ConfigError: --config /no/such/file: no such file (load.py, line ")
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_the_doctor_leaves_nothing_behind(tmp_path):
    folder, temporary = tmp_path / "empty", tmp_path / "temporary"
    folder.mkdir(), temporary.mkdir()
    env = ENV | {"TMPDIR": str(temporary), "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    words = [sys.executable, "-m", "rgrl", "doctor"]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    names = ["versions", "CUDA devices", "CPU", "bf16", "between processes", "disk", "model hub", "W&B", "self-test"]
    assert list(told) == names and told["W&B"].startswith("offline")
    assert re.fullmatch(r"passed in \d+\.\d s", told["self-test"])
    assert not os.listdir(temporary) and not [path for path in folder.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------- installed, and launched
def settings_elsewhere(tiny: dict, folder: Path) -> Path:
    """A user's own folder: settings with paths in it, and a reward beside them."""
    (folder / "my_rewards.py").write_text("def brevity(p, c, r): return [-float(len(text)) for text in c]")
    reward = {"functions": {"my_rewards:brevity": 0.1}}
    return write(changed(tiny, reward=reward, run={"output_dir": "runs/mine", "steps": 1, "eval_steps": 0}), folder)


@pytest.mark.slow
def test_the_launcher_adds_nothing_to_what_a_run_says(tiny, tmp_path, monkeypatch):
    config = settings_elsewhere(tiny, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = launch_file("one_cpu", "--num_cpu_threads_per_process", "1", "-m")
    out, err = start("rgrl", "train", "--config", config, launcher=words).communicate(timeout=170)
    assert err.startswith(f"rgrl {rgrl.__version__} | 1 process on cpu (1 thread)"), err
    assert "rewards/brevity/mean" in (tmp_path / "runs/mine/metrics.jsonl").read_text() and "adapter: " in out


@pytest.mark.slow
def test_a_launcher_that_starts_fewer_processes_than_asked_for_is_noticed(tiny, tmp_path):
    config = write(changed(tiny, run={"steps": 1, "eval_steps": 0}), tmp_path)
    words = ["--cpu", "--num_processes", "2", "-m"]
    printed = finish(start("rgrl", "train", "--config", config, launcher=words))
    assert printed.count("warning: `accelerate launch` was asked for several processes and has started one") == 1


@pytest.mark.slow
def test_a_wheel_needs_no_clone(tiny, tmp_path):
    source, wheels, site = (tmp_path / name for name in ("source", "wheels", "site"))
    shutil.copytree(REPO / "rgrl", source / "rgrl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, source], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *wheels.glob("*.whl")], check=True)
    shutil.rmtree(source)
    (tmp_path / "mine").mkdir()
    config = settings_elsewhere(tiny, tmp_path / "mine")
    env = ENV | {"PYTHONPATH": str(site)}
    for words in (
        ["--help"],
        ["schema"],
        ["presets", "gsm8k"],
        ["train", "--config", config.name],
        ["report", "runs/mine"],
        ["doctor"],
    ):
        command = [site / "bin" / "rgrl", *words]
        done = subprocess.run(command, cwd=config.parent, env=env, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        assert words[0] != "train" or "/runs/mine/checkpoints/step_000001/adapter" in done.stdout
