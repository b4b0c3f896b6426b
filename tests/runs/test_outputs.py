"""What a run leaves: a float32 adapter, tables, a picture, and a record for W&B."""

import os

import matplotlib.image
import pytest
import torch
from processes import ENV, TRAIN, finish, start
from safetensors.torch import load
from training import adapter, go, resolved, tables, untimed, write

from rgrl.models import load_policy
from rgrl.tracking import report


def test_bfloat16_base_trains_a_float32_adapter(tiny, tmp_path):
    tiny["model"]["dtype"] = tiny["reward"]["dtype"] = tiny["judge"]["dtype"] = "bfloat16"
    tiny["objective"] |= {"name": "grpo"}
    tiny["optim"] |= {"updates": 2}
    assert load_policy(resolved(tiny, tmp_path).model).causal_lm.dtype == torch.bfloat16
    output = go(tiny, tmp_path)
    lines = untimed(output)
    assert len(lines) == 3 and all(value is not None for line in lines for value in line.values())
    assert all(line["update/skipped"] == 0 and line["grad_norm"] > 0 for line in lines[1:])
    weights = load(adapter(output, 2))
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert all(t.isfinite().all() and t.any() for t in weights.values())


COLUMNS = {
    "train": ["prompt", "completion", "guided", "reward", "advantage", "rewards/model"],
    "eval": "index sample prompt completion guided reward judge length top_word rewards/model".split(),
}


def test_tables_and_picture_of_a_run(tiny, tmp_path):
    output = go(tiny, tmp_path, eval_steps=1)
    found = tables(output)
    names = ["eval_000000", "eval_000001", "eval_000002", "train_000001", "train_000002"]
    assert list(found) == [f"{name}.parquet" for name in names]
    for name, rows in found.items():
        assert list(rows[0]) == COLUMNS[name.partition("_")[0]] and len(rows) == 4
    logged = untimed(output)[2]
    for name, column, metric in (("train", "reward", "reward"), ("eval", "judge", "eval/judge")):
        total = sum(row[column] for row in found[f"{name}_000002.parquet"])
        assert total / 4 == pytest.approx(logged[metric], abs=1e-5)
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
    env = {k: v for k, v in ENV.items() if not k.startswith(("WANDB_", "XDG_", "NETRC"))}
    config = write(tiny, tmp_path)
    printed = finish(start(TRAIN, "--config", config, env=env | {"HOME": str(tmp_path / "home")})).lower()
    assert not [word for word in ("api key", "choice", "log in", "login", "wandb: ") if word in printed], printed
    assert f"| w&b offline, in {tmp_path / 'run' / 'wandb'}".lower() in printed
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    run_id = (tmp_path / "run" / "wandb_id.txt").read_text()
    assert (folder / f"run-{run_id}.wandb").stat().st_size > 1000
    assert os.listdir(tmp_path / "run" / "completions") == ["train_000001.parquet"]
