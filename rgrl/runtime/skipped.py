"""The batch of a skipped update, kept for diagnosis."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from rgrl.console import warn
from rgrl.folder import Owner, not_ours, replace


def keep_batch(output: Path, owner: Owner, rank: int, step: int, keep: int, batch: dict[str, Any]) -> None:
    """Write this rank's batch of a skipped update in `step` (from 0) to `output`/skipped.

    Of those that the run wrote the newest `keep` stay.

    `batch` holds what `torch.save` can write, with `totals` of the loss and the gradient's norm among it.
    """
    folder = output / "skipped"
    if rank == 0:
        told = ", ".join(f"{name} {float(batch['totals'][name]):g}" for name in ("loss", "grad_norm"))
        warn(f"step {step + 1}: an update is skipped ({told}); its batch is in {folder}")
    try:
        folder.mkdir(exist_ok=True)
        buffer = io.BytesIO()  # so that a full disk is an `OSError`
        torch.save({"run": owner.id, "step": step + 1, **batch}, buffer)  # the step as in metrics.jsonl
        path = folder / f"step_{step + 1:06d}_rank_{rank}.pt"
        if (path.exists() or path.is_symlink()) and not _owns(path, owner):
            raise not_ours(path)
        replace(path, buffer.getbuffer(), owner)
        written = [path for path in sorted(folder.glob(f"step_*_rank_{rank}.pt")) if _owns(path, owner)]
        for old in written[:-keep]:
            old.unlink()
    except OSError as error:  # a diagnosis must not end a run
        warn(f"cannot write {folder}: {error}")


def _owns(path: Path, owner: Owner) -> bool:
    """Whether the run wrote this batch, of which next to nothing is read."""
    try:
        kept = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        return owner.owns(kept.get("run")) and {"step", "totals"} <= kept.keys()
    except (OSError, EOFError, RuntimeError, ValueError, AttributeError, LookupError, pickle.UnpicklingError):
        return False
