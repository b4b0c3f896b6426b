"""The recipe whose policy and reward model have different tokenizers: what a run says and logs of the bridge."""

import pytest
from checkpoints import REPO

from rgrl.config import load_config
from rgrl.metrics import METRICS
from rgrl.tracking import read_metrics
from rgrl.trainer import train

SHORT = "--run.steps 1 --run.eval_steps 0 --run.save_steps 0 --tracking.wandb false --run.prompts_per_device 2".split()


def test_a_run_says_and_logs_how_much_of_the_text_its_guide_is_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPO)
    words = [*SHORT, "--run.output_dir", str(tmp_path / "run")]
    out = train(load_config(REPO / "recipes" / "reviews" / "llada.yaml", words))
    shares = "3694 exact (73.9 %), 1301 composed (26.0 %), 0 unmatched (0.0 %), 5 special"
    assert f"bridge compose: of 5000 policy tokens {shares}" in capfd.readouterr().err
    line = read_metrics(out / "metrics.jsonl")[-1]
    shown = {name: value for name, value in line.items() if name.startswith("bridge/")}
    assert shown.keys() == {name for name in METRICS if name.startswith("bridge/")}
    assert shown["bridge/vocabulary/exact"] == 3694 and shown["bridge/vocabulary/composed"] == 1301
    assert shown["bridge/exact"] + shown["bridge/composed"] == pytest.approx(1.0)
    assert 0.7 < shown["bridge/exact"] <= 1.0 and shown["bridge/unmatched"] == 0.0
