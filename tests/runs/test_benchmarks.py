"""recipes/bench.py and recipes/scaling.py: tables are complete, ratios are those of their seconds and rates."""

import json
import re
import subprocess
import sys

import pytest
from checkpoints import REPO
from processes import ENV
from training import write


def call(recipe: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPO / "recipes" / recipe, *map(str, arguments)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=170)
    assert done.returncode == code, done.stderr
    return done


def test_bench_times_every_guidance_against_its_floor(tmp_path):
    out = tmp_path / "bench.json"
    words = ["--shape", "tiny", "--rounds", 1, "--guidance-steps", 1, 3, "--device", "cpu", "--json", out]
    done = call("bench.py", *words)
    rows = {row["variant"]: row for row in json.loads(out.read_text())["table"]}
    kinds = ("expectation", "aps", "entrgi", "floor")
    assert set(rows) == {"none", "floor M=0"} | {f"{kind} M={m}" for kind in kinds for m in (1, 3)}
    for name, row in rows.items():
        floor = rows["floor M=0"] if name == "none" else rows[f"floor {name.split()[1]}"]
        assert row["ratio"] == pytest.approx(row["seconds"] / floor["seconds"])
        assert row["tokens_per_second"] == pytest.approx(2 * 8 / row["seconds"])
        assert name in done.stdout


@pytest.mark.slow
def test_scaling_compares_one_process_with_two(tiny, tmp_path):
    words = ["--config", write(tiny, tmp_path), "--processes", 1, 2, "--rounds", 1, "--require", 99]
    done = call("scaling.py", *words, code=1)
    assert "below 99" in done.stderr
    one, two = ([float(x) for x in re.findall(r"[\d.]+", line)] for line in done.stdout.splitlines()[1:])
    assert one[0] == 1 and two[0] == 2 and one[1] > 0
    assert one[2:] == [1, 1] and two[2] == two[3] == pytest.approx(two[1] / one[1], abs=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench.py", "--shape", "tiny", "--steps", 0], "--steps must be 1 or more"),
        (["bench.py", "--shape", "tiny", "--rounds", 0], "--rounds must be 1 or more"),
        (["bench.py", "--shape", "tiny", "--json", "/nowhere/bench.json"], "no such folder"),
        (["scaling.py", "--config", "nowhere.yaml", "--steps", 0], "--steps and --rounds must be 1 or more"),
    ],
)
def test_bad_input_is_one_line(words, message):
    done = call(*words, code=2)
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_scaling_reports_what_its_processes_refuse(tiny, tmp_path):
    tiny["model"]["path"] = "/nowhere"
    done = call("scaling.py", "--config", write(tiny, tmp_path), "--processes", 1, code=2)
    assert done.stderr == "error: 1 processes failed: model.path /nowhere: no such folder\n"
