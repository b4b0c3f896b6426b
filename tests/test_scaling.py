"""`recipes/scaling.py`: it launches what it says and its ratios are those of its rates."""

import re
import subprocess
import sys

import pytest
from conftest import REPO
from processes import ENV, write

SCALING = REPO / "recipes" / "scaling.py"


def scaling(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCALING, *map(str, arguments)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=170)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
def test_it_compares_one_process_with_two(tiny, tmp_path):
    config = write(tiny, tmp_path / "config.yaml")
    done = scaling("--config", config, "--processes", 1, 2, "--rounds", 1, "--require", 99, code=1)
    assert "below 99" in done.stderr
    one, two = ([float(x) for x in re.findall(r"[\d.]+", line)] for line in done.stdout.splitlines()[1:])
    assert one[0] == 1 and two[0] == 2 and one[1] > 0
    assert one[2:] == [1, 1] and two[2] == two[3] == pytest.approx(two[1] / one[1], abs=0.02)


def test_bad_input_is_one_line():
    assert scaling("--config", "nowhere.yaml", "--steps", 0, code=2).stderr.count("\n") == 1


@pytest.mark.slow
def test_what_the_processes_refuse_is_told(tiny, tmp_path):
    tiny["model"]["path"] = "/nowhere"
    done = scaling("--config", write(tiny, tmp_path / "config.yaml"), "--processes", 1, code=2)
    assert done.stderr == "error: 1 processes failed: model.path /nowhere: no such folder\n"
