"""Checkpoints: their format, saving in the background, choosing one, and strict resuming."""

from rgrl.checkpoint.choose import HEADER, check_writable, find_checkpoint, owns_request, take_folder
from rgrl.checkpoint.content import progress_of
from rgrl.checkpoint.format import Progress, checkpoints, damage
from rgrl.checkpoint.resume import (
    MODEL,
    check_compatible,
    check_data,
    check_model,
    check_start,
    kept,
    load,
    load_adapter,
    warn_changed_models,
)
from rgrl.checkpoint.save import Saver, Snapshot, newest, set_aside_after, take_snapshot, write
from rgrl.checkpoint.start import code_commit, other_base, start_fingerprint

__all__ = [
    "HEADER",
    "MODEL",
    "Progress",
    "Saver",
    "Snapshot",
    "check_compatible",
    "check_data",
    "check_model",
    "check_start",
    "check_writable",
    "checkpoints",
    "code_commit",
    "damage",
    "find_checkpoint",
    "kept",
    "load",
    "load_adapter",
    "newest",
    "other_base",
    "owns_request",
    "progress_of",
    "set_aside_after",
    "start_fingerprint",
    "take_folder",
    "take_snapshot",
    "warn_changed_models",
    "write",
]
