"""A killed and resumed run equals an undisturbed one: the same bytes, the same metrics, the same tables."""

import functools
import hashlib
import importlib.metadata
import json
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import PROMPTS, REPO, write_dream, write_reward
from processes import TRAIN, altered_train, finish, start, start_ranks, wait_until
from safetensors.torch import load_file
from training import adapter, assert_same_run, changed, go, resolved, saved, tables, untimed, write

from rgrl.checkpoint import Saver, check_model, checkpoints, damage, save
from rgrl.config import OptimConfig, load_config
from rgrl.errors import ConfigError
from rgrl.folder import RUN_FILE, owner_of
from rgrl.models import load_policy
from rgrl.step import learning_rate
from rgrl.tracking import read_metrics
from rgrl.trainer import Loop, evaluate

RECIPE = REPO / "recipes" / "reviews" / "base.yaml"
VARIANTS = {
    "everything": {
        "lora": {"dropout": 0.2},
        "objective": {"name": "grpo", "beta": 0.05},
        "optim": {"updates": 3, "schedule": "linear", "warmup_steps": 4, "weight_decay": 0.1},
        "run": {"gradient_accumulation_steps": 2},
    },
    "reinforce": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_in_step_7_and_resumed_is_the_uninterrupted_run(tiny, tmp_path, variant):
    for section, changes in VARIANTS[variant].items():
        tiny[section] |= changes
    tiny["reward"]["functions"] = {"processes:die_at_call": 0.5}
    tiny["run"] |= {"steps": 10, "save_steps": 3, "eval_steps": 5}
    config, whole, broken = write(tiny, tmp_path), tmp_path / "whole", tmp_path / "broken"

    undisturbed = start(TRAIN, "--config", config, "--run.output_dir", whole)
    # One call a step, and two for each of the evaluations at steps 0 and 5 (guided too): the eleventh is in step 7.
    killed = start(TRAIN, "--config", config, "--run.output_dir", broken, DIE_AT="0:11")
    finish(killed, -signal.SIGKILL)
    finish(undisturbed)
    assert [line["step"] for line in untimed(broken)] == list(range(7))
    assert saved(broken) in (["step_000003"], ["step_000003", "step_000006"])  # the second is written beside step 7
    finish(start(TRAIN, "--config", config, "--run.output_dir", broken, "--run.resume_from_checkpoint", "latest"))

    assert_same_run(broken, whole, 10)
    assert adapter(whole, 10) != adapter(whole, 9)
    assert [line["step"] for line in untimed(whole)] == list(range(11))


@pytest.mark.slow
def test_launched_pair_goes_on_after_one_rank_died(tiny, tmp_path):
    tiny["reward"]["functions"] = {"processes:die_at_call": 0.5}
    tiny["run"] |= {"steps": 5, "save_steps": 2, "eval_steps": 5}
    tiny["lora"]["dropout"] = 0.1
    config, whole, broken = write(tiny, tmp_path), tmp_path / "whole", tmp_path / "broken"
    printed = finish(start(TRAIN, "--config", config, "--run.output_dir", whole, processes=2))
    assert printed.count("unguided, held-out prompts") == 1, "only the main process reports"
    # Two calls for the evaluation at step 0 (guided too) and one for each step: the sixth is in step 4.
    finish(start(TRAIN, "--config", config, "--run.output_dir", broken, processes=2, DIE_AT="1:6"), 1)
    assert saved(broken) == ["step_000002"]
    resumed = ["--config", config, "--run.output_dir", broken, "--run.resume_from_checkpoint", "latest"]
    refused = finish(start(TRAIN, *resumed), 2)
    assert "a step had 4 prompts (2 processes x `run.prompts_per_device` 2) and would now have 2 (1 x 2)" in refused
    assert "set `run.prompts_per_device` to 4" in refused
    finish(start(TRAIN, *resumed, processes=2))
    # Only the main process's adapter was saved. If the other rank's had been different, the undisturbed run, in which
    # each goes on with its own, would now differ from the one in which both got the saved one.
    assert_same_run(broken, whole, 5)


@pytest.mark.slow
def test_killed_while_saving_again_and_again(tiny, tmp_path):
    tiny["run"] |= {"steps": 6, "save_steps": 1, "eval_steps": 0, "keep_checkpoints": 1}
    config, whole, broken = write(tiny, tmp_path), tmp_path / "whole", tmp_path / "broken"
    finish(start(TRAIN, "--config", config, "--run.output_dir", whole))
    # Each flush of a file takes long enough to be killed in.
    slowly = "import os, time; flush = os.fsync; os.fsync = lambda file: (time.sleep(0.5), flush(file))"
    words = ["--config", config, "--run.output_dir", broken]
    for step, delay in ((2, 0.0), (3, 0.6), (4, 1.1)):
        process = start(altered_train(tmp_path, slowly), *words)
        partial = functools.partial(broken.glob, f"checkpoints/.partial_{step:06d}_*")
        wait_until(lambda partial=partial: any(partial()))
        time.sleep(delay)
        process.kill()
        finish(process, -signal.SIGKILL)
        assert any(partial()), "the kill came in the middle of a save"
        words[4:] = ["--run.resume_from_checkpoint", "latest"]
    finish(start(TRAIN, *words))
    assert adapter(broken, 6) == adapter(whole, 6)
    assert untimed(broken) == untimed(whole)
    assert saved(broken) == ["step_000006"]


def test_only_the_newest_checkpoints_are_kept(tiny, tmp_path):
    tiny["run"]["eval_steps"] = 0
    go(tiny, tmp_path, steps=5, save_steps=1, keep_checkpoints=2)
    assert saved(tmp_path / "run") == ["step_000004", "step_000005"]
    go(tiny, tmp_path, steps=7, save_steps=1, keep_checkpoints=3, resume_from_checkpoint="latest")
    assert saved(tmp_path / "run") == ["step_000005", "step_000006", "step_000007"]


def test_what_a_crash_leaves_behind_is_not_resumed_from(tiny, tmp_path):
    tiny["run"]["eval_steps"] = 0
    whole, output = go(tiny, tmp_path, steps=3, output_dir="whole"), go(tiny, tmp_path, steps=2)
    partial = output / "checkpoints" / f".partial_000003_{owner_of(output).id}"
    shutil.copytree(output / "checkpoints" / "step_000002", partial)
    (partial / "state.pt").write_bytes(b"cut")
    (partial / "left.over").touch()
    with (output / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 3, "reward": 0.5}\n{"step": 4, "rew')
    go(tiny, tmp_path, steps=3, resume_from_checkpoint="latest")
    assert saved(output) == ["step_000002", "step_000003"]
    assert not (output / "checkpoints" / "step_000003" / "left.over").exists()
    assert adapter(output, 3) == adapter(whole, 3)
    assert untimed(output) == untimed(whole)


def test_going_back_to_an_older_checkpoint_keeps_what_follows_from_it(tiny, tmp_path):
    tiny["run"]["eval_steps"] = 0
    output, backup = go(tiny, tmp_path, steps=1), tmp_path / "backup"
    shutil.copytree(output / "checkpoints" / "step_000001", backup)
    go(tiny, tmp_path, steps=4, resume_from_checkpoint="latest")
    before = adapter(output, 4)
    tiny["objective"]["beta"] = 1.0
    go(tiny, tmp_path, steps=2, resume_from_checkpoint=str(backup))
    assert saved(output) == ["step_000002"], "the steps after it belong to the abandoned branch"
    go(tiny, tmp_path, steps=4, resume_from_checkpoint="latest")
    assert [line["step"] for line in untimed(output)] == [1, 2, 3, 4]
    assert adapter(output, 4) != before


@pytest.mark.slow
@pytest.mark.parametrize("outside", [False, True])
def test_going_back_and_killed_before_the_next_save_a_run_does_not_resume_the_abandoned_branch(tiny, tmp_path, outside):
    tiny["reward"]["functions"] = {"processes:die_at_call": 0.0}
    tiny["run"] |= {"eval_steps": 0, "steps": 4, "keep_checkpoints": 9}
    config, output = write(tiny, tmp_path), tmp_path / "run"
    finish(start(TRAIN, "--config", config))
    back = output / "checkpoints" / "step_000001"
    if outside:
        back = shutil.copytree(back, tmp_path / "copy")
    words = ["--config", config, "--objective.beta", "1.0", "--run.save_steps", "0", "--run.resume_from_checkpoint"]
    printed = finish(start(TRAIN, *words, back, DIE_AT="0:2"), -signal.SIGKILL)
    assert "set aside" in printed and saved(output) == ([] if outside else ["step_000001"])
    aside = [path.name for path in (output / "checkpoints").glob(".partial_*")]
    assert len(aside) == (4 if outside else 3) and [line["step"] for line in untimed(output)] == [1, 2]
    finish(start(TRAIN, *words, back if outside else "latest"))
    assert saved(output)[-1] == "step_000004" and len(saved(output)) == (1 if outside else 2)
    assert [line["step"] for line in untimed(output)] == [1, 2, 3, 4]


def test_evaluations_and_tables_do_not_change_what_a_run_learns(tiny, tmp_path):
    go(tiny, tmp_path, steps=4, output_dir="whole")
    go(tiny, tmp_path, steps=2)
    tiny["tracking"]["completions_steps"] = 0
    del tiny["judge"]
    go(tiny, tmp_path, steps=4, eval_steps=0, save_steps=0, keep_checkpoints=5, resume_from_checkpoint="latest")
    assert adapter(tmp_path / "run", 4) == adapter(tmp_path / "whole", 4)
    assert saved(tmp_path / "run") == ["step_000001", "step_000002", "step_000004"]


def test_resumed_run_follows_its_own_learning_rate(tiny, tmp_path):
    tiny["run"]["eval_steps"] = 0
    go(tiny, tmp_path, steps=1)
    tiny["optim"] |= {"learning_rate": 4e-3, "schedule": "linear", "weight_decay": 0.5}
    go(tiny, tmp_path, steps=4, resume_from_checkpoint="latest")
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 3e-3, 2e-3, 1e-3])
    state = torch.load(tmp_path / "run" / "checkpoints" / "step_000004" / "state.pt")
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("linear", 4, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 4, [0.25, 0.5, 0.75, 1, 1, 0.853553, 0.5, 0.146447]),
        ("cosine", 20, [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]),
    ],
)
def test_the_learning_rate_of_each_update(schedule, warmup, expected):
    optim = OptimConfig(learning_rate=2.0, updates=4, schedule=schedule, warmup_steps=warmup)
    words = ["--run.steps", "2"]
    config = replace(load_config(RECIPE, words), optim=optim)
    assert [learning_rate(config, n) / 2 for n in range(8)] == pytest.approx(expected, abs=1e-6)


CONTENT = [
    "about.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "config.yaml",
    "progress.json",
    "state.pt",
]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_is_what_the_run_needs_and_nothing_else(tiny, tmp_path, dream_dir):
    root = go(tiny, tmp_path, eval_steps=0) / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000001", "step_000002"]
    assert (root / "latest").read_text() == "step_000002\n"
    folder = root / "step_000002"
    assert files(folder) == sorted([*CONTENT, "manifest.json"])
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(manifest) == CONTENT
    for name, entry in manifest.items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    about = json.loads((folder / "about.json").read_text())
    models = {"model", "reward", "guide", "judge"}
    assert about.keys() == models | {"format", "run", "processes", "versions", "commit", "prompts", "rows"}
    assert about["format"] == 1 and about["run"] == owner_of(tmp_path / "run").id
    assert about["processes"] == 1 and about["prompts"].startswith("6 prompts (SHA-256 ")
    assert about["model"].keys() == {"family", "config", "tokenizer", "weights"} and about["guide"] == about["reward"]
    assert about["versions"]["torch"] == importlib.metadata.version("torch")
    state = torch.load(folder / "state.pt", weights_only=True)
    assert set(state) == {"optimizer", "rng"} and set(state["rng"][0]) >= {"torch", "python", "numpy"}
    weights = sum(t.numel() * 4 for t in load_file(folder / "adapter" / "adapter_model.safetensors").values())
    size = sum((folder / name).stat().st_size for name in files(folder))
    # The adapter and Adam's two moments; the frozen base, larger by far, is not in it.
    assert size < 3 * weights + 100_000 < (dream_dir / "model.safetensors").stat().st_size


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit in the middle of a file, whose size stays."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_is_noticed_and_the_newest_whole_checkpoint_taken(tiny, tmp_path, capfd):
    output, backup = go(tiny, tmp_path, steps=3, eval_steps=0), tmp_path / "backup"
    newest, before = output / "checkpoints" / "step_000003", output / "checkpoints" / "step_000002"
    shutil.copytree(newest, backup)
    for name in CONTENT:
        shutil.rmtree(newest)
        shutil.copytree(backup, newest)
        assert damage(newest) is None
        flip(newest / name)
        assert damage(newest) == f"{name} is not what was written: its SHA-256 is another"
        with pytest.raises(ConfigError, match=f"step_000003, it is damaged: {name}"):
            go(tiny, tmp_path, steps=4, resume_from_checkpoint=str(newest))
    capfd.readouterr()
    go(tiny, tmp_path, steps=4, eval_steps=0, resume_from_checkpoint="latest")
    told = f"{newest}: {CONTENT[-1]} is not what was written: its SHA-256 is another; resuming from the newest whole "
    assert f"warning: damaged: {told}checkpoint, {before}" in capfd.readouterr().err
    assert saved(output) == ["step_000003", "step_000004"] and not any(map(damage, checkpoints(output)))
    assert adapter(output, 3) == (backup / "adapter" / "adapter_model.safetensors").read_bytes()


def test_manifest_missing_edited_or_incomplete(tiny, tmp_path):
    folder = go(tiny, tmp_path, eval_steps=0) / "checkpoints" / "step_000002"
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    assert damage(folder) is None
    spoiled = [
        "",
        "[]",
        json.dumps({"files": {}}),
        json.dumps({"files": {**good["files"], "state.pt": {"bytes": 1}}}),
        json.dumps({"files": {k: v for k, v in good["files"].items() if k != "state.pt"}}),
        json.dumps({"files": {**good["files"], "more.pt": good["files"]["state.pt"]}}),
    ]
    for text in spoiled:
        path.write_text(text)
        assert damage(folder), text
    path.unlink()
    assert damage(folder)


def own_models(tiny: dict, folder: Path) -> None:
    """Copies of the models, which a test may move and spoil."""
    for section, name in (("model", "policy"), ("reward", "reward"), ("judge", "judge")):
        tiny[section]["path"] = str(shutil.copytree(tiny[section]["path"], folder / name))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_moved_with_its_model_and_data_a_run_ends_with_the_same_bytes(tiny, tmp_path, capfd):
    own_models(tiny, tmp_path)
    whole = go(tiny, tmp_path, steps=3, output_dir="whole")
    go(tiny, tmp_path, steps=2)
    place = tmp_path / "another" / "place"
    place.mkdir(parents=True)
    for name in ("policy", "reward", "judge", "prompts.jsonl", "run"):
        (tmp_path / name).rename(place / name)
    for section in ("model", "reward", "judge"):
        tiny[section]["path"] = str(place / Path(tiny[section]["path"]).name)
    tiny["data"] |= dict.fromkeys(("path", "eval_path"), str(place / "prompts.jsonl"))
    capfd.readouterr()
    moved = go(tiny, place, steps=3, resume_from_checkpoint="latest")
    assert "warning" not in capfd.readouterr().err
    assert_same_run(moved, whole, 3)


def test_another_model_under_the_same_path_is_refused(tiny, tmp_path):
    tiny["run"]["eval_steps"] = 0
    own_models(tiny, tmp_path)
    output, folder, backup = go(tiny, tmp_path, steps=1), tmp_path / "policy", tmp_path / "backup"
    folder.rename(backup)
    changes = {
        "weights": lambda: write_dream(folder, seed=5),  # of the same shapes
        "config.json": lambda: edit_json(folder / "config.json", rms_norm_eps=1e-5),
        "tokenizer": lambda: edit_json(folder / "tokenizer_config.json", chat_template="{{ messages[0].content }}"),
        "config.json and weights": lambda: write_dream(folder, seed=6, rope_theta=500.0),
    }
    for parts, change in changes.items():
        shutil.copytree(backup, folder)
        change()
        told = f"`model.path` {folder} is not the model of that run, its {parts} differ; set it to where"
        with pytest.raises(ConfigError, match=re.escape(told)):
            go(tiny, tmp_path, resume_from_checkpoint="latest")
        if parts == "weights":
            with pytest.raises(ConfigError, match=re.escape(told)):
                evaluate(resolved(changed(tiny, run={"resume_from_checkpoint": "latest", "eval_steps": 1}), tmp_path))
        shutil.rmtree(folder)
    assert saved(output) == ["step_000001"] and len(untimed(output)) == 1
    backup.rename(folder)
    go(tiny, tmp_path, resume_from_checkpoint="latest")


def test_a_model_of_the_hub_is_known_by_its_content_and_named_by_its_commit(tiny, tmp_path):
    commits = {seed: tmp_path / "snapshots" / (digit * 40) for seed, digit in ((0, "a"), (5, "b"))}
    for seed, folder in commits.items():
        write_dream(folder, seed=seed)
    again = shutil.copytree(commits[0], tmp_path / "snapshots" / ("c" * 40))
    tiny["model"]["path"] = str(commits[0])
    checkpoint = go(tiny, tmp_path, steps=1, eval_steps=0) / "checkpoints" / "step_000001"
    check_model(checkpoint, load_policy(again))
    with pytest.raises(ConfigError, match=r"weights differ \(commit of the Hub: then aaaaaaaaaaaa, now bbbbbbbbbbbb\)"):
        check_model(checkpoint, load_policy(commits[5]))


def test_another_family_is_refused_and_its_own_by_name_is_not(tiny, tmp_path):
    checkpoint = go(tiny, tmp_path, steps=1, eval_steps=0) / "checkpoints" / "step_000001"
    tiny["model"]["family"] = "dream"
    go(tiny, tmp_path, eval_steps=0, resume_from_checkpoint="latest")
    policy = load_policy(tiny["model"]["path"])
    policy.fingerprint["family"] = "mine"
    with pytest.raises(ConfigError, match=r"`model.family` was dream and is now mine"):
        check_model(checkpoint, policy)


def test_other_prompts_under_the_same_name_are_refused(tiny, tmp_path):
    tiny["run"]["eval_steps"] = 0
    go(tiny, tmp_path, steps=1)
    prompts = Path(tiny["data"]["path"])
    prompts.write_text(prompts.read_text().replace("thriller", "comedy"))
    with pytest.raises(ConfigError, match=r"`data.path` held 6 prompts \(SHA-256 \w+\) and now holds 6 prompts"):
        go(tiny, tmp_path, resume_from_checkpoint="latest")


def test_other_columns_of_the_same_prompts_are_refused(tiny, tmp_path, monkeypatch):
    """But not what a reward function writes into the rows that it is given."""
    tiny["run"]["eval_steps"] = 0
    (tmp_path / "writing.py").write_text(
        "def count(prompts, completions, rows):\n"
        "    for row in rows: row['seen'] = row.get('seen', 0) + 1\n"
        "    return [float(row['gold']) for row in rows]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tiny["reward"]["functions"] = {"writing:count": 1.0}
    path, rows = tmp_path / "gold.jsonl", [{"prompt": text, "gold": i} for i, text in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny["data"] |= {"path": str(path), "eval_path": str(path)}
    go(tiny, tmp_path, steps=1)
    go(tiny, tmp_path, steps=2, resume_from_checkpoint="latest")
    path.write_text("".join(json.dumps(row | {"gold": 9}) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"`data.path` holds the same prompts, but its other columns"):
        go(tiny, tmp_path, steps=3, resume_from_checkpoint="latest")


def test_other_reward_models_judges_and_evaluation_data_are_told_in_one_line(tiny, tmp_path, capfd):
    own_models(tiny, tmp_path)
    output = go(tiny, tmp_path, steps=1)
    for name, seed in (("reward", 7), ("judge", 8)):
        shutil.rmtree(tmp_path / name)
        write_reward(tmp_path / name, seed=seed)
    tiny["data"]["eval_prompts"] = 3
    capfd.readouterr()
    go(tiny, tmp_path, resume_from_checkpoint="latest")
    [told] = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    what = "the reward model (weights), the guide (weights), the judge (weights), the evaluation data"
    checkpoint = output / "checkpoints" / "step_000001"
    assert told.endswith(f"warning: not the same as in {checkpoint}: {what}; expect a kink in the curves at this step")


def without_fingerprints(checkpoint: Path) -> None:
    """Make a checkpoint one that was saved before they were recorded, in a run without an id."""
    output = checkpoint.parents[1]
    (output / RUN_FILE).unlink()
    (output / "config.yaml").write_bytes((output / "config.yaml").read_bytes().partition(b"\n")[2])
    about, manifest = checkpoint / "about.json", checkpoint / "manifest.json"
    content = json.loads(about.read_text())
    about.write_text(json.dumps({name: content[name] for name in ("processes", "prompts", "versions")}))
    files = json.loads(manifest.read_text())["files"]
    files["about.json"] = {"bytes": about.stat().st_size, "sha256": hashlib.sha256(about.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps({"files": files}))


def test_a_checkpoint_without_fingerprints_is_compared_by_its_paths_and_prompts(tiny, tmp_path):
    tiny["run"]["eval_steps"] = 0
    own_models(tiny, tmp_path)
    whole, output = go(tiny, tmp_path, steps=2, output_dir="whole"), go(tiny, tmp_path, steps=1)
    without_fingerprints(output / "checkpoints" / "step_000001")
    tiny["model"]["path"] = str(shutil.copytree(tmp_path / "policy", tmp_path / "moved"))
    with pytest.raises(ConfigError, match=f"`model.path` was {tmp_path / 'policy'} and is now {tmp_path / 'moved'}"):
        go(tiny, tmp_path, resume_from_checkpoint="latest")
    tiny["model"]["path"] = str(tmp_path / "policy")
    prompts = tmp_path / "prompts.jsonl"
    text = prompts.read_text()
    prompts.write_text(text.replace("thriller", "comedy"))
    with pytest.raises(ConfigError, match=r"`data.path` held 6 prompts"):
        go(tiny, tmp_path, resume_from_checkpoint="latest")
    prompts.write_text(text)
    go(tiny, tmp_path, resume_from_checkpoint="latest")
    assert_same_run(output, whole, 2)
    assert "model" in json.loads((output / "checkpoints" / "step_000002" / "about.json").read_text())


def test_every_setting_that_differs_is_named_by_itself(tiny, tmp_path):
    go(tiny, tmp_path, steps=1, eval_steps=0)
    tiny["lora"] |= {"r": 8, "targets": ["q_proj"]}
    targets = "['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']"
    told = f"step_000001: `lora.r` was 4 and is now 8, `lora.targets` was {targets} and is now ['q_proj']"
    with pytest.raises(ConfigError, match=re.escape(told) + "$"):
        go(tiny, tmp_path, resume_from_checkpoint="latest")


def test_everything_that_may_change_on_resuming(tiny, tmp_path):
    go(tiny, tmp_path, steps=1)
    tiny["guidance"] |= {"eta": 0.1, "steps": 2}
    tiny["objective"] |= {"name": "grpo", "beta": 0.1, "advantage": "centred"}
    tiny["optim"]["updates"] = 2
    tiny["rollout"]["temperature"] = 0.5
    tiny["optim"]["learning_rate"] = 5e-3
    tiny["tracking"]["completions_steps"] = 0
    run = {"save_steps": 2, "eval_steps": 0, "keep_checkpoints": 1, "gradient_accumulation_steps": 2}
    lines = untimed(go(tiny, tmp_path, steps=3, resume_from_checkpoint="latest", **run))
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and "ratio" in lines[-1]


def test_a_save_writes_the_state_of_its_step_whatever_is_trained_meanwhile(tiny, tmp_path, monkeypatch):
    whole, write_now = go(tiny, tmp_path, steps=3, eval_steps=0, output_dir="whole"), save.write

    def late(config, snapshot):
        step = snapshot.progress.step
        wait_until(lambda: step == 3 or untimed(tmp_path / "run")[-1]["step"] > step)
        return write_now(config, snapshot)

    monkeypatch.setattr(save, "write", late)
    go(tiny, tmp_path, steps=3, eval_steps=0)
    for step in (2, 3):
        assert adapter(tmp_path / "run", step) == adapter(whole, step)


@pytest.mark.slow
def test_saving_after_every_step_costs_training_less_than_5_percent(tmp_path, monkeypatch):
    """At the default recipe's own size, in CPU time of the training thread, which other processes do not change."""
    seconds = {Saver.save: 0.0, Loop.run_steps: 0.0}

    def timed(function):
        def call(*arguments):
            start = time.thread_time()
            try:
                return function(*arguments)
            finally:
                seconds[function] += time.thread_time() - start

        return call

    config = yaml.safe_load(RECIPE.read_text())
    config["run"] |= {"steps": 4, "eval_steps": 0, "save_steps": 1}
    config["tracking"] = {"wandb": False, "completions_steps": 0}
    for section in ("model", "data", "reward", "judge"):
        config[section] |= {k: str(REPO / v) for k, v in config[section].items() if k.endswith("path")}
    monkeypatch.setattr(Saver, "save", timed(Saver.save))
    monkeypatch.setattr(Loop, "run_steps", timed(Loop.run_steps))
    go(config, tmp_path)
    saving, everything = seconds.values()
    print(f"\nsaving: {saving:.3f} of {everything:.2f} s")
    assert 0 < saving < 0.05 * (everything - saving)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tiny, tmp_path):
    tiny["reward"]["functions"] = {"processes:die_at_call": 0.0}  # draws from the global generators
    tiny["run"] |= {"eval_steps": 2, "prompts_per_device": 2}
    config, whole, other = write(tiny, tmp_path), tmp_path / "whole", tmp_path / "other"
    words = ["--config", config, "--run.steps", "6", "--run.output_dir"]
    finish(start(TRAIN, *words, whole))
    finish(start(TRAIN, *words, other, "--run.steps", "2"))
    more = ["--run.resume_from_checkpoint", "latest"]
    for rank in start_ranks(2, TRAIN, *words, other, *more, "--run.steps", "4", "--run.prompts_per_device", "1"):
        finish(rank)
    state = torch.load(other / "checkpoints" / "step_000004" / "state.pt", weights_only=True)
    assert len(state["rng"]) == 2
    assert not torch.equal(state["rng"][0]["torch"], state["rng"][1]["torch"])
    finish(start(TRAIN, *words, other, *more))
    alone, pair = untimed(whole), untimed(other)
    assert [line["step"] for line in pair] == list(range(7))
    # The same prompts in the same order, those of all processes.
    for name, rows in tables(whole).items():
        assert [row["prompt"] for row in tables(other)[name]] == [row["prompt"] for row in rows], name
    # And so the same rollouts, until Adam has made something of the last digits.
    for a, b in zip(alone[:4], pair[:4], strict=True):
        same = [key for key in a if "die_at_call" not in key]
        assert {key: b[key] for key in same} == pytest.approx({key: a[key] for key in same}, abs=1e-4)
