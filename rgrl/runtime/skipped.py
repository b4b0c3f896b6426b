"""The batch of a skipped update, kept for diagnosis."""

import io
from pathlib import Path
from typing import Any

import torch

from rgrl.console import warn


def keep_batch(output: Path, rank: int, step: int, keep: int, batch: dict[str, Any]) -> None:
    """Write this rank's batch of a skipped update in `step` (from 0) to `output`/skipped, where the newest `keep` stay.

    `batch` holds what `torch.save` can write, with `totals` of the loss and the gradient's norm among it.
    """
    folder = output / "skipped"
    if rank == 0:
        told = ", ".join(f"{name} {float(batch['totals'][name]):g}" for name in ("loss", "grad_norm"))
        warn(f"step {step + 1}: an update is skipped ({told}); its batch is in {folder}")
    try:
        folder.mkdir(exist_ok=True)
        buffer = io.BytesIO()  # so that a full disk is an `OSError`
        torch.save({"step": step + 1, **batch}, buffer)  # the step as in metrics.jsonl
        (folder / f"step_{step + 1:06d}_rank_{rank}.pt").write_bytes(buffer.getbuffer())
        for old in sorted(folder.glob(f"step_*_rank_{rank}.pt"))[:-keep]:
            old.unlink()
    except OSError as error:  # a diagnosis must not end a run
        warn(f"cannot write {folder}: {error}")
