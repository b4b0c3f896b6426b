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
`rgrl/models/fingerprint.py`, those of data in `rgrl/data/fingerprint.py`. `start` is the adapter that the run began
with, if any, and `commit` is git's name for the code, if it is a clone (start.py). `run` is the run's id (folder.py),
which is in the manifest too, and `format` is `FORMAT`.

Older checkpoints can be resumed: those without `format` and `run`, and before them those which have only `processes`,
`versions` and `prompts`. One of a newer format is refused.
"""

import functools
import hashlib
import importlib.metadata
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict

import rgrl
from rgrl.folder import Owner, is_id
from rgrl.models import Policy

FORMAT = 1
_NAME = re.compile("step_([0-9]{6,10})")
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
    found = [path for path in (output_dir / "checkpoints").glob("step_*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 where it has another name, such as a copy."""
    named = _NAME.fullmatch(folder.name)
    return int(named[1]) if named else -1


def run_of(folder: Path) -> str | None:
    """The id of the run that wrote a checkpoint, by either of the two files that say it, whole or not.

    None where neither does: an older version wrote it, or it is none.
    """
    for name in ("manifest.json", "about.json"):
        try:
            found = json.loads((folder / name).read_bytes()).get("run")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if is_id(found):
            return found
    return None


def owns_checkpoint(folder: Path, owner: Owner) -> bool:
    """Whether a run wrote this checkpoint, whole or not."""
    mark = run_of(folder)
    return owner.owns(mark) and (mark is not None or (folder / "manifest.json").is_file())


def own_checkpoints(output: Path, owner: Owner) -> list[Path]:
    """The checkpoints in a run's folder that the run wrote, oldest first."""
    return [folder for folder in checkpoints(output) if owns_checkpoint(folder, owner)]


def owns_latest(path: Path) -> bool:
    """Whether the file `latest` beside the checkpoints is one that a run wrote, or nothing yet."""
    if path.is_symlink() or not path.is_file():
        return not path.is_symlink() and not path.exists()
    return re.fullmatch(rb"(step_[0-9]+\n)?", path.read_bytes()) is not None


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
    """Restore such a state. The learning rate and other settings stay the optimizer's own. Raises `RuntimeError`."""
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
