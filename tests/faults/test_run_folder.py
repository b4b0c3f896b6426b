"""A run's folder loses nothing: it has one trainer, an owner, and checkpoints that say what they have to say."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faulty
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from checkpoints import REPO
from processes import ENV, TRAIN, altered_train, finish, start, wait_until
from safetensors.torch import load_file, save_file
from training import adapter, assert_same_run, changed, go, resealed, resolved, saved, untimed, write

from rgrl import trainer
from rgrl.checkpoint import checkpoints
from rgrl.cli import main
from rgrl.errors import ConfigError, RunStoppedError
from rgrl.folder import RUN_FILE, owner_of
from rgrl.runtime.lock import NAME, only_trainer
from rgrl.tracking import read_metrics
from rgrl.trainer import train

OLDER = REPO / "tests" / "helpers" / "older" / "run"  # made by rgrl 0.1.0 before runs had an id and a format
SHORT = {"lora": {"r": 1, "alpha": 2, "targets": ["q_proj"]}, "run": {"steps": 2, "eval_steps": 0}}


@pytest.fixture(autouse=True)
def fresh():
    faulty.reset()


def short_in(tiny: dict) -> dict:
    """The settings of the run in `OLDER`."""
    return changed(tiny, **SHORT)


@pytest.fixture(scope="module")
def ran(tiny_in, tmp_path_factory) -> tuple[dict, Path]:
    """The settings of a run and its folder, with a checkpoint of each of its two steps."""
    folder = tmp_path_factory.mktemp("ran")
    settings = short_in(tiny_in(folder))
    return settings, go(settings, folder)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


# ------------------------------------------------------------------------------------------------- what is refused


class Case:
    """A copy of the finished run, in which a case spoils something."""

    def __init__(self, folder: Path, ran: tuple[dict, Path]) -> None:
        self.folder, self.run, self.config = folder, folder / "run", ran[0]
        shutil.copytree(ran[1], self.run)
        self.newest = self.run / "checkpoints" / "step_000002"
        self.settings = {"output_dir": str(self.run), "resume_from_checkpoint": "latest", "steps": 3}

    def words(self) -> list[str]:
        run = {key: value for key, value in self.settings.items() if value is not None}
        return ["train", "--config", str(write(changed(self.config, run=run), self.folder / "given.yaml"))]


Change = Callable[[Case], object]


def edited(name: str, change: Callable[[dict], object]) -> Change:
    """A file of JSON or YAML in the newest checkpoint, changed, with hashes that match."""

    def spoil(case: Case) -> None:
        path = case.newest / name
        read, put = (json.loads, json.dumps) if name.endswith("json") else (yaml.safe_load, yaml.safe_dump)
        tree = read(path.read_text())
        found = change(tree)
        path.write_text(put(tree if found is None else found))
        resealed(case.newest)

    return spoil


def replaced(name: str, content: bytes) -> Change:
    def spoil(case: Case) -> None:
        (case.newest / name).write_bytes(content)
        resealed(case.newest)

    return spoil


def state(change: Callable[[dict], object]) -> Change:
    def spoil(case: Case) -> None:
        tree = torch.load(case.newest / "state.pt", weights_only=True)
        found = change(tree)
        torch.save(tree if found is None else found, case.newest / "state.pt")
        resealed(case.newest)

    return spoil


def tensors(change: Callable[[dict], object]) -> Change:
    def spoil(case: Case) -> None:
        path = case.newest / "adapter" / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)
        resealed(case.newest)

    return spoil


def given(**settings: object) -> Change:
    return lambda case: case.settings.update(settings)


def both(*changes: Change) -> Change:
    return lambda case: [change(case) for change in changes]


def put(name: str, content: bytes = b"mine") -> Change:
    """A file in the run's folder that somebody else has put there."""

    def spoil(case: Case) -> None:
        path = case.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return spoil


def elsewhere(name: str) -> Change:
    """A new run in a folder that holds a file of the user's, and no run."""
    return lambda case: (
        put("../own/" + name)(case),
        case.settings.update(output_dir=str(case.folder / "own"), resume_from_checkpoint=None),
    )


def in_own_folder(case: Case) -> None:
    """`output_dir: .`, beside the file of settings."""
    write({"model": {}}, case.folder / "config.yaml")
    case.settings.update(output_dir=str(case.folder), resume_from_checkpoint=None)


def of_another_run(case: Case) -> None:
    """Another run's checkpoint, to go on from in this run's folder."""
    other = shutil.copytree(case.run, case.folder / "other")
    for path in [*other.glob("checkpoints/*/*.json"), other / RUN_FILE]:
        path.write_text(path.read_text().replace(owner_of(case.run).id, "e" * 32))
    case.settings["resume_from_checkpoint"] = str(resealed(other / "checkpoints" / "step_000001"))
    manifest = other / "checkpoints" / "step_000001" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"run": "e" * 32}))


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


FILES = ("about.json", "progress.json")
CASES: list[tuple[str, Change, list[str]]] = [
    # ----- a folder that another hand has been in
    ("config.yaml of the user's own", in_own_folder, ["holds `config.yaml`", "choose another folder"]),
    *(
        (f"{name} before there is a run", elsewhere(name), [f"holds `{name.partition('/')[0]}`", "another folder"])
        for name in (
            "reward.png",
            "requeue",
            "metrics.jsonl",
            "completions/notes.txt",
            "checkpoints/.partial_notes/a",
            "skipped/a.pt",
            "wandb_id.txt",
        )
    ),
    ("a run's folder for a new run", given(resume_from_checkpoint=None), ["already holds a run", "latest"]),
    ("config.yaml written by hand", put("config.yaml", b"model: {}\n"), ["config.yaml is there already"]),
    ("requeue of somebody's own", put("requeue", b"do this again"), ["requeue is there already", "move it away"]),
    ("requeue is no file", lambda case: (case.run / "requeue").mkdir(), ["requeue is there already"]),
    ("latest of somebody's own", put("checkpoints/latest", b"the best one"), ["latest is there already"]),
    ("a later checkpoint is no checkpoint", put("checkpoints/step_000003/notes"), ["step_000003 is there already"]),
    ("a later table is somebody's own", put("completions/train_000003.parquet"), ["train_000003.parquet is there"]),
    (
        "a later table is another run's",
        lambda case: pq.write_table(pa.table({"a": [1]}), case.run / "completions" / "train_000003.parquet"),
        ["train_000003.parquet is there already"],
    ),
    ("an id that is none", put(RUN_FILE, b"{}"), [RUN_FILE, "does not say which run"]),
    ("an id that is no JSON", put(RUN_FILE, b"\xff\xfe"), [RUN_FILE, "does not say which run"]),
    ("an id of another type", put(RUN_FILE, b'{"id": 7, "older": false}'), [RUN_FILE]),
    ("an id too deep", put(RUN_FILE, nested(10**5)), [RUN_FILE]),
    ("a lock file that is no lock", put(NAME, b"what I noted"), [NAME, "move it away"]),
    ("a lock file that leads away", lambda case: (case.run / NAME).symlink_to("/etc/hostname"), ["cannot be written"]),
    ("a folder that is a file", lambda c: (shutil.rmtree(c.run), c.run.write_bytes(b"mine")), ["is not a folder"]),
    ("another run's checkpoint", of_another_run, ["step_000001 is not of the run in", "choose another folder"]),
    ("all checkpoints gone", lambda case: shutil.rmtree(case.run / "checkpoints"), ["no checkpoint of this run"]),
    # ----- paths
    ("a variable that is not set", given(output_dir="$NO_SUCH_VARIABLE/run"), ["NO_SUCH_VARIABLE is not set"]),
    ("a user who is not there", given(output_dir="~nobody-here/run"), ["there is no user '~nobody-here'"]),
    ("a name too long", given(output_dir="x" * 300), ["`run.output_dir` must be a path of at most 255 bytes"]),
    ("too long from the root on", given(output_dir="/".join(["y" * 250] * 15 + ["z" * 240])), ["`run.output_dir`"]),
    ("below a file", lambda case: given(output_dir=str(case.folder / "given.yaml" / "a"))(case), ["not a folder"]),
    ("a checkpoint that is not there", given(resume_from_checkpoint="~/no/such"), ["is not a checkpoint folder"]),
    ("a checkpoint of NUL", given(resume_from_checkpoint="a\0b"), ["`run.resume_from_checkpoint` must be text"]),
    # ----- whole by its hashes, and wrong
    *(
        (f"{name}: {what}", replaced(name, content), [name])
        for name in FILES
        for what, content in {
            "no JSON": b"{",
            "not text": b"\xff\xfe\x00",
            "a list": b"[1]",
            "null": b"null",
            "empty": b"",
            "too deep": nested(10**5),
            "a number of too many digits": b'{"step": ' + b"9" * 5000 + b"}",
        }.items()
    ),
    *((f"about.json without {key}", edited("about.json", lambda t, key=key: t.pop(key) and None), [key])
      for key in ("processes", "versions", "prompts")),
    *((f"about.json with another {key}", edited("about.json", lambda t, key=key: t.update({key: [1]})), [key])
      for key in ("processes", "versions", "prompts", "rows", "model", "format", "run", "reward", "start", "commit")),
    ("about.json of a newer format", edited("about.json", lambda t: t.update(format=2)), ["format 2", "newer rgrl"]),
    ("about.json: no processes", edited("about.json", lambda t: t.update(processes=0)), ["`processes`"]),
    ("about.json: versions of nothing", edited("about.json", lambda t: t.update(versions={})), ["`versions`"]),
    ("about.json: no family", edited("about.json", lambda t: t["model"].pop("family") and None), ["`model`"]),
    *((f"progress.json without {key}", edited("progress.json", lambda t, key=key: t.pop(key)), [key])
      for key in ("step",)),
    *((f"progress.json: a step of {step!r}", edited("progress.json", lambda t, step=step: t.update(step=step)), words)
      for step, words in ((1, ["of step 1"]), (-1, ["`step`"]), (2.0, ["`step`"]), ("2", ["`step`"]),
                          (True, ["`step`"]), (None, ["`step`"]), (10**30, ["`step`"]))),
    ("progress.json: more", edited("progress.json", lambda t: t.update(more=1)), ["`more`"]),
    ("progress.json: evaluations of a list", edited("progress.json", lambda t: t.update(evaluations=[])), ["`evalu"]),
    ("progress.json: evaluations of nothing", edited("progress.json", lambda t: t.update(evaluations={"a": 1})),
     ["`evaluations` is no memory"]),
    ("progress.json: evaluations of text",
     edited("progress.json", lambda t: t.update(evaluations={"basis": "", "count": "x", "kept": []})), ["no memory"]),
    ("config.yaml: a list", replaced("config.yaml", b"- 1"), ["config.yaml"]),
    ("config.yaml: no YAML", replaced("config.yaml", b"a: ["), ["config.yaml"]),
    ("config.yaml: an object", replaced("config.yaml", b"!!python/object:os.system {}"), ["config.yaml"]),
    ("config.yaml: too deep", replaced("config.yaml", b"[" * 5000), ["config.yaml"]),
    ("config.yaml without run", edited("config.yaml", lambda t: t.pop("run") and None), ["`run`"]),
    ("config.yaml: lora of text", edited("config.yaml", lambda t: t.update(lora="x")), ["`lora`"]),
    ("config.yaml: prompts of text", edited("config.yaml", lambda t: t["run"].update(prompts_per_device="x")),
     ["`run.prompts_per_device` must be a whole number"]),
    ("config.yaml without prompts", edited("config.yaml", lambda t: t["run"].pop("prompts_per_device") and None),
     ["`prompts_per_device`"]),
    ("state.pt: a pickle", replaced("state.pt", b"cos\nsystem\n(S'true'\ntR."), ["state.pt"]),
    ("state.pt: no archive", replaced("state.pt", b"PK\x03\x04 and no more"), ["state.pt"]),
    ("state.pt: a list", state(lambda t: [t]), ["state.pt"]),
    ("state.pt without optimizer", state(lambda t: t.pop("optimizer") and None), ["`optimizer`"]),
    ("state.pt without rng", state(lambda t: t.pop("rng") and None), ["`rng`"]),
    ("state.pt: no ranks", state(lambda t: t.update(rng=[])), ["`rng`"]),
    ("state.pt: rng of numbers", state(lambda t: t.update(rng=[1])), ["state.pt"]),
    ("state.pt: half an rng", state(lambda t: t["rng"][0].pop("numpy") and None), ["state.pt"]),
    ("state.pt: torch's rng cut", state(lambda t: t["rng"][0].update(torch=torch.zeros(3, dtype=torch.uint8))),
     ["state.pt"]),
    ("state.pt: moments of another adapter", state(lambda t: t["optimizer"].update(exp_avg=torch.zeros(3))),
     ["`exp_avg` is not of this adapter"]),
    ("state.pt: half the moments", state(lambda t: t["optimizer"].__delitem__("exp_avg")), ["`optimizer`"]),
    ("state.pt: moments of text", state(lambda t: t["optimizer"].update(exp_avg="x")), ["`optimizer`"]),
    ("adapter: no settings", replaced("adapter/adapter_config.json", b"{}"), ["peft_type"]),
    ("adapter: no JSON", replaced("adapter/adapter_config.json", b"{"), ["adapter_config.json"]),
    ("adapter: no tensors", replaced("adapter/adapter_model.safetensors", b"x" * 100), ["adapter_model.safetensors"]),
    ("adapter: NaN", tensors(lambda t: next(iter(t.values())).fill_(float("nan"))), ["NaN"]),
    ("adapter: infinite", tensors(lambda t: next(iter(t.values())).fill_(float("inf"))), ["inf"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_bad_folder_or_checkpoint_is_one_line_and_loses_nothing(change, words, ran, tmp_path, capfd):
    case = Case(tmp_path, ran)
    change(case)
    command = case.words()
    before = contents(tmp_path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(command)
    lines = [line for line in capfd.readouterr().err.splitlines() if "Loading weights" not in line]
    assert exit_.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert contents(tmp_path) == before


def test_there_are_many_of_them():
    assert len(CASES) >= 90


# ------------------------------------------------------------------------------------------------- whose the folder is


def test_what_others_put_into_a_run_stays_there(tiny, tmp_path, capfd):
    tiny = changed(short_in(tiny), run={"keep_checkpoints": 1})
    output = go(tiny, tmp_path)
    theirs = {
        "checkpoints/.partial_notes/a.txt": b"1",
        "checkpoints/.partial_000001/a.txt": b"2",
        "checkpoints/step_000001/a.txt": b"3",
        "checkpoints/notes.txt": b"4",
        "reward.png": b"5",
        "completions/train_000001.txt": b"6",
        "skipped/step_000001_rank_0.pt": b"7",
        "metrics.partial": b"8",
        "log.txt": b"9",
    }
    for name, content in theirs.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)
    words = ["--config", str(write(tiny, tmp_path)), "--run.steps", "4", "--run.resume_from_checkpoint", "latest"]
    main(["train", *words])
    assert {name: (output / name).read_bytes() for name in theirs} == theirs
    assert saved(output) == ["step_000001", "step_000004"]  # the first is theirs
    captured = capfd.readouterr()
    assert "the plot cannot be written" in captured.err and "reward.png is there already" in captured.err
    assert "adapter: " in captured.out  # all else is reported


def test_a_run_draws_its_own_plot_anew_and_nobody_elses(tiny, tmp_path, capfd):
    output = go(short_in(tiny), tmp_path)
    main(["report", str(output)])
    main(["report", str(output)])
    drawn = (output / "reward.png").read_bytes()
    other = go(short_in(tiny), tmp_path, output_dir="other")
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(other), "--output", str(output / "reward.png")])
    assert exit_.value.code == 2 and (output / "reward.png").read_bytes() == drawn
    assert "is there already" in capfd.readouterr().err


def test_a_copy_of_its_own_checkpoint_is_the_runs_and_anothers_begins_a_new_one(tiny, tmp_path):
    tiny = short_in(tiny)
    first = go(tiny, tmp_path, output_dir="first")
    second = go(tiny, tmp_path, output_dir="second", resume_from_checkpoint=str(first / "checkpoints" / "step_000001"))
    assert owner_of(first) and owner_of(second) and owner_of(first) != owner_of(second)
    ids = [json.loads((path / "about.json").read_text())["run"] for path in checkpoints(second)]
    assert set(ids) == {owner_of(second).id} and adapter(first, 2) == adapter(second, 2)
    before = contents(second)
    with pytest.raises(ConfigError, match="step_000001 is not of the run in"):
        go(tiny, tmp_path, output_dir="second", resume_from_checkpoint=str(first / "checkpoints" / "step_000001"))
    assert contents(second) == before
    copy = shutil.copytree(second / "checkpoints" / "step_000002", tmp_path / "copy")
    go(tiny, tmp_path, output_dir="second", steps=3, resume_from_checkpoint=str(copy))
    assert saved(second)[-1] == "step_000003"


def test_a_run_that_took_no_update_starts_again_with_the_same_command(tiny, tmp_path):
    tiny = changed(short_in(tiny), reward={"functions": {"faulty:reward": 0.5}}, run={"eval_steps": 2})
    tiny["guidance"]["probe_prompts"] = 0
    whole = go(tiny, tmp_path, output_dir="whole")
    faulty.reset()
    faulty.in_reward[2] = faulty.fail  # in the first rollout, after the evaluation
    with pytest.raises(ConfigError, match="this rank has had it"):
        go(tiny, tmp_path)
    assert [line["step"] for line in untimed(tmp_path / "run")] == [0]
    mine, faulty.in_reward[3] = owner_of(tmp_path / "run"), lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(RunStoppedError):  # asked to stop in the evaluation before the first step, which it saves
        go(tiny, tmp_path)
    assert saved(tmp_path / "run") == ["step_000000"]
    go(tiny, tmp_path)
    assert owner_of(tmp_path / "run") == mine
    assert_same_run(tmp_path / "run", whole, 2)
    with pytest.raises(ConfigError, match="already holds a run"):
        go(tiny, tmp_path)


# ------------------------------------------------------------------------------------------------- older runs


@pytest.fixture
def older(tiny, tmp_path) -> tuple[dict, Path]:
    """A run of an older version, which knew no ids and no format, and the settings to go on with it."""
    output = shutil.copytree(OLDER, tmp_path / "run")
    settings = short_in(tiny)
    go(changed(settings, run={"steps": 1}), tmp_path, output_dir="now")
    # The tiny models of today, in case these tests make them otherwise one day; nothing else is changed.
    about = output / "checkpoints" / "step_000001" / "about.json"
    today = json.loads((tmp_path / "now" / "checkpoints" / "step_000001" / "about.json").read_text())
    models = {name: today[name] for name in ("model", "reward", "guide", "judge")}
    about.write_text(json.dumps(json.loads(about.read_text()) | models))
    resealed(output / "checkpoints" / "step_000001")
    return settings, output


def test_an_older_checkpoint_is_resumed_and_its_run_gets_an_id(older, tmp_path, capfd):
    settings, output = older
    lines = untimed(output)
    (output / "checkpoints" / ".partial_000002").mkdir()
    go(settings, tmp_path, resume_from_checkpoint="latest")
    told = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert all("was saved with" in line for line in told)  # other libraries
    assert saved(output) == ["step_000001", "step_000002"] and not any(output.glob("checkpoints/.partial*"))
    assert untimed(output)[:1] == lines and [line["step"] for line in untimed(output)] == [1, 2]
    about = json.loads((output / "checkpoints" / "step_000002" / "about.json").read_text())
    assert about["format"] == 1 and about["run"] == owner_of(output).id and owner_of(output).older
    go(settings, tmp_path, steps=4, keep_checkpoints=1, resume_from_checkpoint="auto")
    assert saved(output) == ["step_000004"]
    main(["export", str(output), "--output", str(tmp_path / "exported")])


def test_an_older_checkpoint_is_not_taken_for_another_runs(older, tmp_path):
    settings, output = older
    copy = shutil.copytree(output / "checkpoints" / "step_000001", tmp_path / "copy")
    go(settings, tmp_path, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match="copy is not of the run in"):
        go(settings, tmp_path, steps=3, resume_from_checkpoint=str(copy))
    assert saved(output) == ["step_000001", "step_000002"]
    go(settings, tmp_path, output_dir="branch", resume_from_checkpoint=str(copy))
    assert adapter(tmp_path / "branch", 2) == adapter(output, 2)


# ------------------------------------------------------------------------------------------------- lines of metrics


def test_a_damaged_line_costs_that_line(tiny, tmp_path, capfd):
    tiny = short_in(tiny)
    output = go(tiny, tmp_path, steps=3)
    path = output / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    for damaged in (
        b"\xff\xfe\x00\n",
        b'{"step": 2, "rew\n',
        b"[2]\n",
        b"\n",
        b'{"step": "2"}\n',
        b'{"step": 2, "a": []}\n',
    ):
        path.write_bytes(first + damaged + third)
        assert [line["step"] for line in read_metrics(path)] == [1, 3]
    path.write_bytes(first + b"\xff\xfe\x00\n" + third + b'{"step": 4, "rew')
    capfd.readouterr()
    main(["report", str(output)])
    assert capfd.readouterr().err.count("metrics.jsonl: line 2 cannot be read: left out") == 1
    go(tiny, tmp_path, steps=4, resume_from_checkpoint="latest")
    assert "metrics.jsonl: line 2 cannot be read" in capfd.readouterr().err
    assert path.read_bytes().startswith(first + b"\xff\xfe\x00\n" + third)  # as it was, for who can mend it
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4]
    path.unlink()
    go(tiny, tmp_path, steps=5, resume_from_checkpoint="latest")
    assert "metrics.jsonl is missing: the metrics up to step 4 are lost" in capfd.readouterr().err
    assert [line["step"] for line in read_metrics(path)] == [5]


# ------------------------------------------------------------------------------------------------- paths


def test_paths_are_written_out_and_stay_where_they_are(tiny, tmp_path, monkeypatch):
    """Though a reward goes elsewhere, and nobody comes back."""
    home, work, far = (tmp_path / name for name in ("home", "work", "far"))
    for folder in (home, work, far):
        folder.mkdir()
    shutil.move(tiny["data"]["path"], work / "prompts.jsonl")
    for name in ("model", "reward", "judge"):
        (work / name).symlink_to(tiny[name]["path"])
    faulty.in_reward |= {1: lambda: os.chdir(far)}
    tiny = changed(
        tiny,
        model={"path": "model"},
        reward={"path": "./reward", "functions": {"faulty:reward": 0.5}},
        judge={"path": "$MINE/judge"},
        data={"path": "prompts.jsonl", "eval_path": "${MINE}/prompts.jsonl"},
        run={"output_dir": "~/run"},
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MINE", str(work))
    monkeypatch.chdir(work)
    assert train(resolved(tiny, tmp_path)) == home / "run"
    assert Path.cwd() == far or Path.cwd() == work  # the second where rewards are brought back
    assert not list(far.iterdir()) and sorted(path.name for path in work.iterdir()) == sorted(
        ["model", "reward", "judge", "prompts.jsonl"]
    )
    settings = yaml.safe_load((home / "run" / "config.yaml").read_text())
    assert settings["judge"]["path"] == str(work / "judge") and settings["model"]["path"] == str(work / "model")
    monkeypatch.chdir(work)
    given = changed(tiny, run={"steps": 3, "resume_from_checkpoint": "$HOME/run/checkpoints/step_000002"})
    train(resolved(given, tmp_path))
    assert saved(home / "run")[-1] == "step_000003"
    report = ["report", "$HOME/run", "--output", "~/run/curve.png"]
    main(report)
    assert (home / "run" / "curve.png").is_file()


def test_a_file_that_is_called_so_is_meant_as_it_is(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("$prompts.txt").write_text("the plot of this film")
    tiny = changed(short_in(tiny), data={"path": "$prompts.txt", "eval_path": None})
    assert len(untimed(go(tiny, tmp_path, steps=1))) == 1


# ------------------------------------------------------------------------------------------------- weights


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch):
    tiny = short_in(tiny)
    update = trainer.update_step

    def spoiled(run, scored, step, *rest):
        done = update(run, scored, step, *rest)
        if step == 2:
            next(p for p in run.policy.parameters() if p.requires_grad).data.view(-1)[3] = float("inf")
        return done

    monkeypatch.setattr(trainer, "update_step", spoiled)
    with pytest.raises(
        RunStoppedError, match=r"after step 3 are not finite \(.*lora_.*the newest .*step_000002"
    ) as caught:
        go(tiny, tmp_path, steps=5)
    assert caught.value.code == 1 and saved(tmp_path / "run") == ["step_000001", "step_000002"]
    monkeypatch.undo()
    whole = go(tiny, tmp_path, steps=4, output_dir="whole")
    go(tiny, tmp_path, steps=4, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "run", whole, 4)


# ------------------------------------------------------------------------------------------------- one trainer


def test_a_lock_keeps_others_out_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    with only_trainer(folder):
        with pytest.raises(ConfigError, match=f"another trainer is at work there .process {os.getpid()} on "):
            with only_trainer(folder):
                pass
        with only_trainer(tmp_path / "a" / "c"):
            pass
        assert (folder / NAME).exists()
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / NAME).write_text("process 1 on another machine, which has died\n")
    with only_trainer(tmp_path / "a"):
        pass
    assert list((tmp_path / "a").iterdir()) == []


def test_a_lock_is_not_its_childrens(tmp_path):
    ready, wait = os.pipe(), os.pipe()
    with only_trainer(tmp_path):
        child = os.fork()
        if not child:
            os.write(ready[1], b"x")
            os.read(wait[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with only_trainer(tmp_path):  # while the child lives
            pass
    finally:
        os.write(wait[1], b"x")
        os.waitpid(child, 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capfd, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_trainer(tmp_path):
        pass
    assert f"has no locks ({os.strerror(number)})" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- real processes


def slow_run(tiny: dict, folder: Path, **run: object) -> Path:
    """A file of settings whose reward and objective are `faulty`'s, once a step each."""
    tiny = changed(short_in(tiny), reward={"functions": {"faulty:reward": 0.5}}, objective={"name": "faulty:objective"})
    return write(changed(tiny, run={"steps": 4, "save_steps": 1} | run), folder)


@pytest.mark.slow
def test_of_two_trainers_one_goes_away(tiny, tmp_path):
    config = slow_run(tiny, tmp_path)
    words = ["--config", config, "--run.resume_from_checkpoint", "auto"]
    waiting = [tmp_path / "one", tmp_path / "other"]
    both = [start(TRAIN, *words, FAULT="reward:2:0:wait", WAITING=str(path)) for path in waiting]
    wait_until(lambda: any(process.poll() is not None for process in both))
    first, second = both if both[0].poll() is None else reversed(both)
    told = finish(second, 2)
    assert told.count("another trainer is at work there (process") == 1 and "Traceback" not in told
    wait_until(lambda: any(path.exists() for path in waiting))
    first.terminate()
    finish(first, 75)
    assert saved(tmp_path / "run") == ["step_000001"] and [line["step"] for line in untimed(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / NAME).exists()


@pytest.mark.slow
def test_a_lock_dies_with_its_process_whatever_a_reward_has_left_behind(tiny, tmp_path):
    config = slow_run(tiny, tmp_path)
    process = start(TRAIN, "--config", config, FAULT="reward:3:0:leave_children")
    finish(process, -signal.SIGKILL)
    children = [int(pid) for pid in (tmp_path / "run" / "children").read_text().split()]
    try:
        assert (tmp_path / "run" / NAME).exists() and all(Path(f"/proc/{pid}").exists() for pid in children)
        go(yaml.safe_load(config.read_text()), tmp_path, resume_from_checkpoint="latest")
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    assert [line["step"] for line in untimed(tmp_path / "run")] == [1, 2, 3, 4]


def interruptible(script: Path, *words: object, **more: str) -> subprocess.Popen:
    """A process that minds Ctrl-C, as one that a person starts, though these tests may run in the background."""
    minds = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{minds}; import runpy; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(script), *map(str, words)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=ENV | more, text=True, start_new_session=True, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["update", "save"])  # test_faults.py has the rollout
def test_ctrl_c_saves_and_a_second_one_ends_the_run_at_once(tiny, tmp_path, place):
    config, output = slow_run(tiny, tmp_path), tmp_path / "run"
    slowly = "import os, time; flush = os.fsync; os.fsync = lambda file: (time.sleep(0.3), flush(file))"
    script = altered_train(tmp_path, slowly) if place == "save" else TRAIN
    fault = {"update": "loss:2:0:SIGINT", "save": "none:0:1:"}[place]
    words = ["--config", config, "--run.output_dir"]
    process = interruptible(script, *words, output, FAULT=fault)
    if place == "save":
        wait_until(lambda: any(output.glob("checkpoints/.partial_000002*")))
        process.send_signal(signal.SIGINT)
    told = finish(process, 130)
    assert "Traceback" not in told and told.count("Ctrl-C again ends the run at once") == 1
    assert "on SIGINT; all is saved" in told and not (output / "requeue").exists()
    step = int(saved(output)[-1].removeprefix("step_"))
    assert step >= 2
    assert [line["step"] for line in untimed(output)] == list(range(1, step + 1))
    if place != "save":
        return
    twice = interruptible(script, *words, tmp_path / "twice")
    wait_until(lambda: any((tmp_path / "twice").glob("checkpoints/.partial_000002*")))
    twice.send_signal(signal.SIGINT)
    wait_until(lambda: "Ctrl-C again" in twice.stderr.readline())
    twice.send_signal(signal.SIGINT)
    told = finish(twice, -signal.SIGINT)
    assert "Traceback" not in told and "all is saved" not in told
    go(yaml.safe_load(config.read_text()), tmp_path, output_dir="twice", resume_from_checkpoint="latest")
    assert [line["step"] for line in untimed(tmp_path / "twice")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_ctrl_c_in_a_program_of_the_users_own(tiny, tmp_path):
    """There the second one is `KeyboardInterrupt`, and nothing waits for a save."""
    script = tmp_path / "own.py"
    script.write_text(
        "import os, sys, time\n"
        "flush = os.fsync; os.fsync = lambda file: (time.sleep(60 if 'slow' in sys.argv else 0), flush(file))\n"
        "import rgrl\n"
        "rgrl.train(rgrl.load_config(sys.argv[1]))\n"
    )
    config = slow_run(tiny, tmp_path)
    process = interruptible(script, config, FAULT="reward:3:0:SIGINT")
    told = finish(process, 1)
    assert "RunStoppedError: stopped at step 2 on SIGINT" in told
    shutil.rmtree(tmp_path / "run")
    twice = interruptible(script, config, FAULT="reward:3:0:SIGINT_twice")
    assert "KeyboardInterrupt" in finish(twice, -signal.SIGINT)
    assert saved(tmp_path / "run")[-1:] in (["step_000001"], ["step_000002"])


@pytest.mark.slow
@pytest.mark.parametrize("how", [">/dev/full 2>&1", ">&- 2>&- <&-", "ascii"])
def test_messages_that_cannot_be_written_end_nothing(tiny, tmp_path, how):
    config = slow_run(changed(tiny, reward={"functions": {"faulty:reward": 0.5}}), tmp_path, steps=2, eval_steps=1)
    prints = tmp_path / "printing.py"
    prints.write_text(
        "import faulty, sys\n"
        "def reward(prompts, completions, rows):\n"
        "    print('é ± 😀' * 1000); print('é ± 😀' * 1000, file=sys.stderr)\n"
        "    return [0.1 * len(text) for text in completions]\n"
    )
    settings = yaml.safe_load(config.read_text())
    settings["reward"]["functions"] = {"printing:reward": 0.5}
    write(settings, tmp_path)
    shell = f'exec "$0" "$@" {how if how[0] == ">" else ""}'
    env = (
        ENV
        | {"PYTHONPATH": f"{tmp_path}:{ENV['PYTHONPATH']}"}
        | ({"PYTHONIOENCODING": "ascii"} if how == "ascii" else {})
    )
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, str(TRAIN), "--config", str(config)],
        env=env,
        capture_output=True,
        timeout=170,
    )
    assert done.returncode == 0, (done.stdout[-1000:], done.stderr[-3000:])
    assert saved(tmp_path / "run") == ["step_000001", "step_000002"]
    assert [line["step"] for line in untimed(tmp_path / "run")] == [0, 1, 2]
    assert (tmp_path / "run" / "reward.png").is_file()
    if how == "ascii":
        assert b"Traceback" not in done.stderr and b"eval/reward" in done.stdout


@pytest.mark.slow
def test_results_that_cannot_be_written_are_an_error(ran, tmp_path):
    report = ["-m", "rgrl", "report", str(ran[1]), "--output", str(tmp_path / "a.png")]
    for how in (">/dev/full", ">&-"):
        done = subprocess.run(
            ["bash", "-c", f'exec "$0" "$@" {how}', sys.executable, *report],
            env=ENV,
            capture_output=True,
            text=True,
            timeout=170,
        )
        assert done.returncode == 1 and done.stderr.count("error: standard output cannot be written") == 1, done.stderr
        assert len(done.stderr.splitlines()) == 1
