"""What a checkpoint folder holds, and whether it is whole.

A checkpoint is a folder `checkpoints/step_000100/` with `adapter/` in peft's own format and under the names of the
base's own checkpoint (models/names.py; older ones have transformers' names), `state.pt` (optimizer, global random state
of each rank), `progress.json`, `config.yaml`, `about.json` and `manifest.json`, which has the size and the SHA-256 of
every other file. It is written under another name, flushed to disk and renamed, and then the file `checkpoints/latest`
is replaced by one that names it. So a folder of this name is whole unless somebody or the disk
changed it, and the manifest shows that.

`about.json` says what a resumed run is compared with, beside the settings: the number of `processes`, the library
`versions`, the fingerprints of the training data (`prompts` and `rows`), of the evaluation data (`eval`, likewise) and
of the models: `model` (the policy), `reward`, `guide` and `judge`, where there is one. Those of models are explained in
`rgrl/models/fingerprint.py`, those of data in `rgrl/data/fingerprint.py`. Before they were recorded there were only
`processes`, `versions` and `prompts`; such checkpoints can be resumed too. `start` is the adapter that the run began
with, if any, and `commit` is git's name for the code, if it is a clone (start.py).
"""

import functools
import hashlib
import importlib.metadata
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import get_peft_model_state_dict
from safetensors import SafetensorError

import rgrl
from rgrl.errors import ConfigError
from rgrl.models import Policy

_NAME = re.compile(r"step_(\d{6,})")
FILES = {
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "state.pt",
    "progress.json",
    "config.yaml",
    "about.json",
}


@dataclass(frozen=True)
class Progress:
    """How far a run is. The rest of its future follows from the config and these."""

    step: int = 0
    num_tokens: int = 0
    skipped_in_a_row: int = 0
    evaluations: dict[str, Any] = field(default_factory=dict)  # what the hacking alarm remembers of earlier ones


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders in `output_dir` that are named as checkpoints, oldest first."""
    found = [p for p in (output_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step_"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file is there as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is missing or damaged"
    if missing := sorted(FILES - expected.keys()):
        return f"manifest.json does not list {missing[0]}"
    for name, (size, digest) in sorted(expected.items()):
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes and not {size}"
            with (folder / name).open("rb") as handle:
                changed = hashlib.file_digest(handle, "sha256").hexdigest() != digest
        except OSError as error:
            return f"{name} is missing or cannot be read ({error.strerror})"
        if changed:
            return f"{name} is not what was written: its SHA-256 is another"
    return None


def about(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `about.json` says of how it was made. Raises `ConfigError`."""
    return read_file(folder / "about.json", lambda path: json.loads(path.read_text(encoding="utf-8")))


def adapter_of(policy: Policy) -> dict[str, torch.Tensor]:
    """The adapter by peft's names."""
    assert policy.peft_model is not None
    trained = {name: p for name, p in policy.peft_model.named_parameters() if p.requires_grad}
    return get_peft_model_state_dict(policy.peft_model, state_dict=trained, save_embedding_layers=False)


def pack(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """AdamW's settings and, after the first update, its state: one flat tensor for each kind of number.

    Hundreds of small tensors would take several times as long to write, and slow the next step.
    """
    saved = optimizer.state_dict()
    kinds: dict[str, Any] = next(iter(saved["state"].values()), {})
    flat = {kind: torch.cat([s[kind].reshape(-1) for s in saved["state"].values()]).cpu() for kind in kinds}
    return flat | {"param_groups": saved["param_groups"]}


def unpack(packed: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Restore such a state. The learning rate and other settings stay the optimizer's own."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {i: {} for i in range(len(parameters))} if len(packed) > 1 else {}
    for kind in packed.keys() - {"param_groups"}:
        shapes = [torch.Size() if kind == "step" else p.shape for p in parameters]
        pieces = packed[kind].split([shape.numel() for shape in shapes])
        for i, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
            state[i][kind] = piece.view(shape).clone()
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that a resumed run's last digits depend on."""
    libraries = ("torch", "transformers", "accelerate", "peft")
    return {"rgrl": rgrl.__version__} | {name: importlib.metadata.version(name) for name in libraries}


def read_file(path: Path, read: Callable[[Path], Any]) -> Any:
    """`read(path)`, with every way in which a file can be unreadable turned into `ConfigError`."""
    try:
        return read(path)
    except (OSError, EOFError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot resume: {path} is missing or damaged ({type(error).__name__})") from error
    except (SafetensorError, pickle.UnpicklingError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot resume: {path} is damaged ({type(error).__name__})") from error
