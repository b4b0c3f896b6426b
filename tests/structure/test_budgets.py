"""One training step stays short enough to be read, as path_of_a_step.py measures it."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_step_runs_through_few_files_and_lines():
    script = Path(__file__).with_name("path_of_a_step.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "rgrl/algo/reward_gradient.py" in done.stdout and "rgrl/rollout/denoise.py" in done.stdout
