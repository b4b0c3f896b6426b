"""`recipes/bench.py`: it runs, its table is complete and its ratios are those of its seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "recipes" / "bench.py"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCH, *arguments], capture_output=True, text=True, timeout=120)


def test_it_times_every_guidance_against_its_floor(tmp_path):
    out = tmp_path / "bench.json"
    done = bench(
        "--shape", "tiny", "--rounds", "1", "--guidance-steps", "1", "3", "--device", "cpu", "--json", str(out)
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rows = {row["variant"]: row for row in result["table"]}
    kinds = ("expectation", "aps", "entrgi", "floor")
    assert set(rows) == {"none", "floor M=0"} | {f"{kind} M={m}" for kind in kinds for m in (1, 3)}
    for name, row in rows.items():
        floor = rows["floor M=0"] if name == "none" else rows[f"floor {name.split()[1]}"]
        assert row["ratio"] == pytest.approx(row["seconds"] / floor["seconds"])
        assert row["tokens_per_second"] == pytest.approx(2 * 8 / row["seconds"])
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--json", "/nowhere/bench.json"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = bench("--shape", "tiny", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
