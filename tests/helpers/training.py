"""Train in this process, and look at what a run leaves in its output folder."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from rgrl.config import Config, load_config
from rgrl.metrics import TIMING
from rgrl.tracking import read_metrics
from rgrl.trainer import train


def write(config: dict, path: Path) -> Path:
    """The settings as a YAML file; in `path` itself, or as config.yaml where that is a folder."""
    path = path / "config.yaml" if path.is_dir() else path
    path.write_text(yaml.safe_dump(config))
    return path


def resolved(config: dict, folder: Path) -> Config:
    return load_config(write(config, folder))


def changed(config: dict, **sections: dict) -> dict:
    """The settings with some changed."""
    return config | {name: config.get(name, {}) | values for name, values in sections.items()}


def go(config: dict, folder: Path, **run) -> Path:
    """Train with some settings of `run` changed; `output_dir` is a path from `folder`. Returns the output folder."""
    run["output_dir"] = str(folder / run.get("output_dir", "run"))
    return train(resolved(changed(config, run=run), folder))


def adapter(output: Path, step: int) -> bytes:
    return (output / "checkpoints" / f"step_{step:06d}" / "adapter" / "adapter_model.safetensors").read_bytes()


def saved(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("step_*"))


def resealed(checkpoint: Path) -> Path:
    """A checkpoint whose files a test has changed, with a manifest that says so."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    contents = {name: (checkpoint / name).read_bytes() for name in manifest["files"]}
    sealed = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
    path.write_text(json.dumps(manifest | {"files": sealed}))
    return checkpoint


def untimed(output: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what no two runs share."""
    lines = read_metrics(output / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(TIMING)} for line in lines]


def tables(output: Path) -> dict[str, list[dict]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((output / "completions").iterdir())}


def assert_same_run(a: Path, b: Path, step: int) -> None:
    """The same adapter after `step` steps, the same metrics and the same tables."""
    assert adapter(a, step) == adapter(b, step), "another adapter"
    assert untimed(a) == untimed(b), "other metrics"
    assert tables(a) == tables(b), "other tables"
