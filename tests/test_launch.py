"""The layout of a run (processes, accumulation, checkpointing) changes none of its numbers; a launched run is whole."""

import json
import os

import matplotlib.image
import pytest
import torch
from launched_update import update
from processes import ENV, TESTS, TRAIN, adapter, finish, saved, start, tables, untimed, write
from safetensors.torch import load, load_file

from rgrl import report
from rgrl.config import load_config
from rgrl.models import load_policy
from rgrl.trainer import train

METRICS = ("loss", "kl", "ratio", "clip_ratio/low", "clip_ratio/high", "grad_norm", "learning_rate")


def assert_same(a: dict, b: dict, atol: float) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def one_update(tiny) -> dict:
    """Settings of an update whose gradients are neither clipped nor 0. With no hidden prompt token there is no noise,
    which each rank would draw for itself."""
    tiny["objective"] = {"name": "grpo", "beta": 0.1, "prompt_mask": 0.0, "iterations": 2}
    tiny["optim"]["max_grad_norm"] = 1e6
    return tiny


def test_two_processes_make_the_update_of_one(one_update, tmp_path):
    config = write(one_update, tmp_path / "config.yaml")
    launched = start(TESTS / "launched_update.py", config, tmp_path, processes=2)
    alone, metrics = update(load_config(config))
    finish(launched)
    for rank in range(2):
        pair, told = (
            load_file(tmp_path / f"rank_{rank}.safetensors"),
            json.loads((tmp_path / f"rank_{rank}.json").read_text()),
        )
        assert told["ranks"] == 2 and metrics["ranks"] == 1
        assert_same(pair, alone, 1e-5)
        assert {k: told[k] for k in METRICS} == pytest.approx({k: metrics[k] for k in METRICS}, abs=1e-5)
    assert_same(load_file(tmp_path / "rank_0.safetensors"), load_file(tmp_path / "rank_1.safetensors"), 0)
    assert metrics["grad_norm"] > 0.1 and metrics["kl"] > 1e-3


@pytest.mark.parametrize("objective", ["likelihood", "reinforce", "grpo"])
def test_accumulation_changes_no_number(one_update, tmp_path, objective):
    one_update["objective"] |= {"name": objective, "prompt_mask": 0.3}
    plain, metrics = update(load_config(write(one_update, tmp_path / "config.yaml")))
    one_update["run"]["gradient_accumulation_steps"] = 4
    split, told = update(load_config(write(one_update, tmp_path / "config.yaml")))
    assert_same(split, plain, 1e-5)
    assert told["forwards"] == 4 * metrics["forwards"]
    assert {k: told[k] for k in METRICS if k in told} == pytest.approx(
        {k: metrics[k] for k in METRICS if k in metrics}, abs=1e-5
    )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(one_update, tmp_path):
    one_update["lora"]["dropout"] = 0.2  # the same tokens must be dropped when the activations are made again
    plain, metrics = update(load_config(write(one_update, tmp_path / "config.yaml")))
    one_update["run"]["gradient_checkpointing"] = True
    again, told = update(load_config(write(one_update, tmp_path / "config.yaml")))
    assert_same(again, plain, 1e-6)
    # Reference and two updates, of which the first gives the old ones; the updates' activations are made a second time.
    assert (metrics["forwards"], told["forwards"]) == (3, 5)


def test_bfloat16_base_trains_a_float32_adapter(tiny, tmp_path):
    tiny["model"]["dtype"] = tiny["reward"]["dtype"] = tiny["judge"]["dtype"] = "bfloat16"
    tiny["objective"] |= {"name": "grpo", "iterations": 2}
    config = load_config(write(tiny, tmp_path / "config.yaml"))
    assert load_policy(config.model).causal_lm.dtype == torch.bfloat16
    train(config)
    lines = untimed(tmp_path / "run")
    assert len(lines) == 3 and all(value is not None for line in lines for value in line.values())
    assert all(line["update/skipped"] == 0 and line["grad_norm"] > 0 for line in lines[1:])
    weights = load(adapter(tmp_path / "run", 2))
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert all(t.isfinite().all() and t.any() for t in weights.values())


def test_tables_and_picture_of_a_run(tiny, tmp_path):
    output, _ = train(load_config(write(tiny, tmp_path / "config.yaml")))
    found = tables(output)
    assert list(found) == [f"eval_00000{i}.parquet" for i in range(3)] + [
        "train_000001.parquet",
        "train_000002.parquet",
    ]
    for name, rows in found.items():
        own = ["prompt", "completion", "reward", "advantage"]
        assert list(rows[0]) == (
            own if "train" in name else ["index", "prompt", "completion", "reward", "judge", "length"]
        )
        assert len(rows) == 4
    logged = untimed(output)[2]
    assert sum(row["reward"] for row in found["train_000002.parquet"]) / 4 == pytest.approx(logged["reward"], abs=1e-5)
    assert sum(row["judge"] for row in found["eval_000002.parquet"]) / 4 == pytest.approx(
        logged["eval/judge"], abs=1e-5
    )
    assert report.plot(output) == output / "reward.png"
    assert (output / "reward.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = matplotlib.image.imread(output / "reward.png")[..., :3]
    colourful = picture.max(-1) - picture.min(-1) > 0.3
    assert picture.shape == (480, 840, 3) and 500 < colourful.sum() < 50_000, "curves on an empty page"


@pytest.mark.slow
def test_wandb_goes_offline_without_account_or_terminal(tiny, tmp_path):
    tiny["tracking"]["wandb"] = True
    tiny["run"] |= {"steps": 1, "eval_steps": 0}
    (tmp_path / "home").mkdir()
    env = {k: v for k, v in ENV.items() if not k.startswith(("WANDB_", "XDG_", "NETRC"))} | {
        "HOME": str(tmp_path / "home")
    }
    config = write(tiny, tmp_path / "config.yaml")
    printed = finish(start(TRAIN, "--config", config, env=env)).lower()
    assert not [word for word in ("api key", "choice", "log in", "login") if word in printed], printed
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    run_id = (tmp_path / "run" / "wandb_id.txt").read_text()
    assert (folder / f"run-{run_id}.wandb").stat().st_size > 1000
    assert os.listdir(tmp_path / "run" / "completions") == ["train_000001.parquet"]


@pytest.mark.slow
def test_launched_pair_goes_on_after_one_rank_died(tiny, tmp_path):
    tiny["reward"]["functions"] = {"processes:die_at_call": 0.5}
    tiny["run"] |= {"steps": 5, "save_steps": 2, "eval_steps": 5}
    tiny["lora"]["dropout"] = 0.1
    config = write(tiny, tmp_path / "config.yaml")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    printed = finish(start(TRAIN, "--config", config, "--run.output_dir", whole, processes=2))
    assert printed.count("eval/reward") == 1, "only the main process reports"
    # Two calls for the evaluation at step 0 (guided too) and one for each step: the sixth is in step 4.
    finish(start(TRAIN, "--config", config, "--run.output_dir", broken, processes=2, DIE_AT="1:6"), 1)
    assert saved(broken) == ["step_000002"]
    resumed = ["--config", config, "--run.output_dir", broken, "--run.resume_from_checkpoint", "latest"]
    refused = finish(start(TRAIN, *resumed), 2)
    assert "a step had 4 prompts (2 processes x `run.prompts_per_device` 2) and would now have 2 (1 x 2)" in refused
    assert "set `run.prompts_per_device` to 4" in refused
    finish(start(TRAIN, *resumed, processes=2))
    # Only the main process's adapter was saved. Had the other rank's been another, the undisturbed run, in which
    # each goes on with its own, would now differ from the one in which both got the saved one.
    assert adapter(broken, 5) == adapter(whole, 5)
    assert untimed(broken) == untimed(whole)
    assert tables(broken) == tables(whole)
