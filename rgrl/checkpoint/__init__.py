"""Checkpoints: their format, saving in the background, and strict resuming."""

from rgrl.checkpoint.format import Progress, checkpoints, damage
from rgrl.checkpoint.resume import (
    MODEL,
    check_compatible,
    check_data,
    check_model,
    check_writable,
    find_checkpoint,
    load,
    load_adapter,
    warn_of_kinks,
)
from rgrl.checkpoint.save import Saver, Snapshot, set_aside_after, take_snapshot, write

__all__ = [
    "MODEL",
    "Progress",
    "Saver",
    "Snapshot",
    "check_compatible",
    "check_data",
    "check_model",
    "check_writable",
    "checkpoints",
    "damage",
    "find_checkpoint",
    "load",
    "load_adapter",
    "set_aside_after",
    "take_snapshot",
    "warn_of_kinks",
    "write",
]
