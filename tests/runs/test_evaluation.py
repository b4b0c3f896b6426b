"""Evaluation: the metrics of a prompt do not depend on the prompts in its batch."""

import json

import pytest
from checkpoints import PROMPTS
from training import changed, resolved

from rgrl.trainer import evaluate


def test_metrics_do_not_depend_on_the_batch_size(tiny, tmp_path):
    prompts = tmp_path / "twelve.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS * 2))
    tiny["data"] |= {"eval_path": str(prompts), "eval_prompts": 12}
    batches = [{"prompts_per_device": n} for n in (2, 6)]  # batches of 8 and 4 rows, and one of 12
    one, other = (evaluate(resolved(changed(tiny, run=run), tmp_path)).metrics for run in batches)
    assert one == pytest.approx(other, abs=1e-4)
    assert {"eval/reward", "eval/judge", "eval/base_nll"} <= one.keys()
