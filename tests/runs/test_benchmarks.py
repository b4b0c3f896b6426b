"""recipes/bench.py and recipes/scaling.py: tables are complete, ratios are those of their seconds and rates."""

import json
import re
import subprocess
import sys

import bench
import gradients
import pytest
import scaling
import torch
from processes import ENV
from training import write


def call(*arguments: object, code: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, scaling.__file__, *map(str, arguments)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=170)
    assert done.returncode == code, done.stderr
    return done


def test_bench_times_every_guidance_against_its_floor(tmp_path, monkeypatch, capfd):
    out = tmp_path / "bench.json"
    words = "--shape tiny --rounds 1 --guidance-steps 1 3 --device cpu --json"
    monkeypatch.setattr(sys, "argv", ["bench.py", *words.split(), str(out)])
    bench.main()
    printed = capfd.readouterr().out
    rows = {row["variant"]: row for row in json.loads(out.read_text())["table"]}
    kinds = ("expectation", "aps", "entrgi", "floor")
    assert set(rows) == {"none", "floor M=0"} | {f"{kind} M={m}" for kind in kinds for m in (1, 3)}
    for name, row in rows.items():
        floor = rows["floor M=0"] if name == "none" else rows[f"floor {name.split()[1]}"]
        assert row["ratio"] == pytest.approx(row["seconds"] / floor["seconds"])
        assert row["tokens_per_second"] == pytest.approx(2 * 8 / row["seconds"])
        assert name in printed


def test_bench_times_whole_steps_against_floors_of_their_own(tmp_path, monkeypatch, capfd):
    out = tmp_path / "bench.json"
    monkeypatch.setattr(
        sys, "argv", [*"bench.py --shape tiny --rounds 1 --whole-steps --device cpu --json".split(), str(out)]
    )
    bench.main()
    rows = {row["variant"]: row for row in json.loads(out.read_text())["table"]}
    names = {f"{kind}{term}" for kind in ("none", "entrgi") for term in ("", " + gradient")}
    assert rows.keys() == names | {f"floor {name}" for name in names}
    for name in names:
        assert rows[name]["ratio"] == pytest.approx(rows[name]["seconds"] / rows[f"floor {name}"]["seconds"])
        assert rows[name]["of_plain"] == pytest.approx(rows[name]["seconds"] / rows["none"]["seconds"])


def test_gradients_of_each_estimate_are_compared(tiny, tmp_path, monkeypatch, capfd):
    out = tmp_path / "gradients.json"
    only = ["trajectory", "gradient", "gradient, guided"]
    words = ["--config", str(write(tiny, tmp_path)), "--steps", "3", "--json", str(out), "--only", *only]
    monkeypatch.setattr(sys, "argv", ["gradients.py", *words])
    gradients.main()
    table = json.loads(out.read_text())["table"]
    assert list(table) == only and all(row["norm"] > 0 for row in table.values())
    assert table["trajectory"]["true"] == pytest.approx(1) and abs(table["gradient"]["true"]) < 1
    assert "cosine of the two halves" in capfd.readouterr().out


def test_the_summary_of_an_estimate_by_hand():
    found_SX = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 3.0]])
    row = gradients.summary(found_SX, torch.tensor([1.0, 0.0]))
    assert row["norm"] == pytest.approx(8**0.5) and row["true"] == pytest.approx(0.5**0.5)
    own = [
        gradients.cosine(*pair) for pair in zip(found_SX, torch.tensor([[1.5, 3], [3, 1.5], [1.5, 1.5]]), strict=True)
    ]
    assert row["own"] == pytest.approx(sum(own) / 3)
    assert row["noise"] == pytest.approx(6 / (8 - 6 / 3))


@pytest.mark.slow
def test_scaling_compares_one_process_with_two(tiny, tmp_path):
    words = ["--config", write(tiny, tmp_path), "--processes", 1, 2, "--rounds", 1, "--require", 99]
    done = call(*words, code=1)
    assert "below 99" in done.stderr
    one, two = ([float(x) for x in re.findall(r"[\d.]+", line)] for line in done.stdout.splitlines()[1:])
    assert one[0] == 1 and two[0] == 2 and one[1] > 0
    assert one[2:] == [1, 1] and two[2] == two[3] == pytest.approx(two[1] / one[1], abs=0.02)


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        (bench, "--shape tiny --steps 0", "--steps must be 1 or more"),
        (bench, "--shape tiny --rounds 0", "--rounds must be 1 or more"),
        (bench, "--shape tiny --json /nowhere/bench.json", "no such folder"),
        (gradients, "--config nowhere.yaml --steps 1", "--steps must be 2 or more"),
        (scaling, "--config nowhere.yaml --steps 0", "--steps and --rounds must be 1 or more"),
    ],
)
def test_bad_input_is_one_line(recipe, words, message, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["recipe", *words.split()])
    with pytest.raises(SystemExit) as exit_:
        recipe.main()
    printed = capfd.readouterr().err
    assert exit_.value.code == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.slow
def test_scaling_reports_what_its_processes_refuse(tiny, tmp_path):
    tiny["model"]["path"] = "/nowhere"
    done = call("--config", write(tiny, tmp_path), "--processes", 1, code=2)
    assert done.stderr == "error: 1 processes failed: model.path /nowhere: no such folder\n"
