"""Make `run` and `expected.json`, at commit cc2d4ec (release 0.1.0): `python tests/golden/release_0.1.0/make.py`."""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "helpers")]

import torch  # noqa: E402
from checkpoints import write_dream, write_reward  # noqa: E402
from conftest import tiny_settings  # noqa: E402
from test_golden import machine  # noqa: E402
from training import adapter, changed, go  # noqa: E402

torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())
dirs = [folder / name for name in ("dream", "reward", "judge")]
for path in dirs:
    path.mkdir()
tiny = tiny_settings(folder, write_dream(dirs[0]), write_reward(dirs[1]), write_reward(dirs[2], seed=2))
tiny = changed(
    tiny,
    lora={"dropout": 0.1},
    guidance={"share": 0.5},
    objective={"name": "grpo", "beta": 0.05, "iterations": 2, "correction": "truncate"},
    gradient={"weight": 0.5, "kl": 1.0, "states": "late"},
)
output = go(tiny, folder, keep_checkpoints=1, steps=2)
digest = hashlib.sha256(adapter(output, 2)).hexdigest()
(HERE / "expected.json").write_text(json.dumps({"adapter": digest, "machine": machine()}, indent=1) + "\n")
shutil.rmtree(output)
output = go(tiny, folder, steps=1)
shutil.rmtree(HERE / "run", ignore_errors=True)
shutil.copytree(output, HERE / "run", ignore=shutil.ignore_patterns(".rgrl_lock", "wandb", "*.png"))
