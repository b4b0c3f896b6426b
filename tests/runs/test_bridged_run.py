"""The recipe whose policy and reward model have different tokenizers: what a run says and logs of the bridge."""

import pytest
from checkpoints import REPO

from rgrl.config import load_config
from rgrl.tracking import METRICS, read_metrics
from rgrl.trainer import train

SHORT = "--run.steps 1 --run.eval_steps 0 --run.save_steps 0 --tracking.wandb false --run.prompts_per_device 2".split()


@pytest.mark.parametrize("mode", ["compose", "zero"])
def test_a_run_says_and_logs_how_much_of_the_text_its_guide_is_shown(mode, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPO)
    words = [*SHORT, "--run.output_dir", str(tmp_path / "run"), "--reward.bridge", mode]
    out = train(load_config(REPO / "recipes" / "reviews" / "llada.yaml", words))
    composed, unmatched = (1301, 0) if mode == "compose" else (0, 1301)
    said = (
        f"bridge {mode}: of 5000 policy tokens 3694 exact (73.9 %), {composed} composed ({composed / 50:.1f} %), "
        f"{unmatched} unmatched ({unmatched / 50:.1f} %), 5 special"
    )
    assert said in capfd.readouterr().err
    line = read_metrics(out / "metrics.jsonl")[-1]
    shown = {name: value for name, value in line.items() if name.startswith("bridge/")}
    assert shown.keys() == {name for name in METRICS if name.startswith("bridge/")}
    assert shown["bridge/vocabulary/exact"] == 3694 and shown["bridge/vocabulary/composed"] == composed
    assert shown["bridge/exact"] + shown["bridge/composed"] + shown["bridge/unmatched"] == pytest.approx(1.0)
    assert 0.7 < shown["bridge/exact"] < 1.0 and (shown["bridge/composed"] > 0) == (mode == "compose")


def test_a_run_with_one_tokenizer_says_nothing_of_a_bridge(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPO)
    words = [*SHORT, "--run.output_dir", str(tmp_path / "run")]
    out = train(load_config(REPO / "recipes" / "reviews" / "guided.yaml", words))
    assert "bridge" not in capfd.readouterr().err
    line = read_metrics(out / "metrics.jsonl")[-1]
    assert "guidance/changed" in line and not [name for name in line if name.startswith("bridge/")]
