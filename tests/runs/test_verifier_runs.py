"""Runs in which a reward model guides and verifiers score."""

import json

import pytest
from checkpoints import PROMPTS
from training import adapter, assert_same_run, changed, go, resolved, tables, untimed

from rgrl.errors import ConfigError
from rgrl.trainer import sample


@pytest.fixture
def verified(tiny, tmp_path, reward_dir) -> dict:
    """Guided by a reward model that scores nothing; scored by verifiers."""
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": text, "answer": None if i == 1 else str(i)} for i, text in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    functions = {
        "numeric": 1.0,
        "repetition": {"weight": 0.1, "normalise": True, "settings": {"n": 1}},
        "length": {"settings": {"most": 3, "slack": 3}, "clip": [-0.5, 0]},
    }
    return changed(tiny, data={"path": str(path), "eval_path": str(path)}) | {
        "reward": {"path": None, "functions": functions},
        "guidance": {"kind": "entrgi", "path": str(reward_dir), "probe_prompts": 2},
        "gradient": {"weight": 0.1, "of": "guide"},
    }


def test_a_model_guides_and_verifiers_score(verified, tmp_path):
    output = go(verified, tmp_path)
    lines = untimed(output)
    for line in lines[1:]:
        assert {"rewards/numeric/mean", "rewards/repetition/mean", "rewards/length/mean"} <= line.keys()
        assert "rewards/model/mean" not in line and "gradient/reward" in line
        assert -0.5 <= line["rewards/length/mean"] <= 0 and line["guidance/broken"] == 0
    assert {"eval/reward", "guidance/reward_before", "guidance/reward_after"} <= lines[-1].keys()
    assert sum(line["rewards/numeric/none"] for line in lines[1:]) > 0, "the row whose answer is null"
    assert adapter(output, 1) != adapter(output, 2)
    assert all(row["reward"] is not None for row in tables(output)["eval_000002.parquet"])
    rows = list(sample(resolved(changed(verified, run={"output_dir": str(tmp_path / "sample")}), tmp_path)))
    assert len(rows) == 8 and all(row["completion"] is not None for row in rows)


@pytest.mark.slow
def test_a_resumed_run_of_verifiers_is_the_same(verified, tmp_path):
    whole = go(verified, tmp_path, output_dir="whole", eval_steps=1)
    go(verified, tmp_path, output_dir="parts", steps=1, eval_steps=1)
    parts = go(verified, tmp_path, output_dir="parts", eval_steps=1, resume_from_checkpoint="latest")
    assert_same_run(whole, parts, 2)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a"}], "reads the column 'answer' of `data.path`; it has prompt"),
        ([{"prompt": "a", "answer": {"b": 1}}], "the first is row 0: 'answer' is {'b': 1}, which is no number"),
        ([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "one"}], "cannot read 1 of 2 rows of `data.path`"),
    ],
)
def test_a_run_does_not_start_on_answers_that_cannot_be_read(verified, tmp_path, rows, words):
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = changed(verified, data={"path": str(path), "eval_path": None})
    config["model"] = {"path": "/no/such/model"}  # before anything that takes long
    with pytest.raises(ConfigError) as error:
        go(config, tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
