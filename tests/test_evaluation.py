"""Evaluation: what a prompt gets does not depend on the prompts it is batched with."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import PROMPTS

from rgrl.config import load_config
from rgrl.trainer import evaluate_checkpoint


def test_metrics_do_not_depend_on_the_batch_size(tiny, tmp_path):
    prompts = tmp_path / "twelve.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS * 2))
    tiny["data"] |= {"eval_path": str(prompts), "eval_prompts": 12}
    metrics = []
    for per_device in (2, 6):  # batches of 8 and 4 rows, and one of 12
        tiny["run"]["prompts_per_device"] = per_device
        path = Path(tmp_path / f"{per_device}.yaml")
        path.write_text(yaml.safe_dump(tiny))
        metrics.append(evaluate_checkpoint(load_config(path))[0])
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-4)
    assert {"eval/reward", "eval/judge", "eval/base_nll"} <= metrics[0].keys()
