"""A run of release 0.1.0 goes on: release_0.1.0/run is what its code left after one step.

It was made by `release_0.1.0/make.py` at commit cc2d4ec, which also took the second step and noted the adapter's
digest.
"""

import hashlib
import json
import shutil
from pathlib import Path

import yaml
from test_golden import machine
from training import adapter, saved, untimed

from rgrl.config import load_config
from rgrl.trainer import train

RELEASE = Path(__file__).with_name("release_0.1.0")


def test_a_run_of_release_0_1_0_resumes_to_the_same_bytes(tiny, tmp_path):
    """With its own config.yaml, whose settings that were removed since are the ones that turned nothing on."""
    output = shutil.copytree(RELEASE / "run", tmp_path / "run")
    settings = yaml.safe_load((output / "config.yaml").read_text())
    for section, key in (
        ("model", "path"),
        ("reward", "path"),
        ("judge", "path"),
        ("data", "path"),
        ("data", "eval_path"),
    ):
        settings[section][key] = tiny[section][key]
    settings["run"] |= {"steps": 2, "output_dir": str(output), "resume_from_checkpoint": "latest"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    train(load_config(tmp_path / "config.yaml"))
    assert saved(output)[-1] == "step_000002"
    assert [line["step"] for line in untimed(output)] == [0, 1, 2]
    expected = json.loads((RELEASE / "expected.json").read_text())
    if expected["machine"] == machine():
        assert hashlib.sha256(adapter(output, 2)).hexdigest() == expected["adapter"]
