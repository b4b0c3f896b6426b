"""Merge an adapter into copies of a checkpoint's own weight files. Every byte that it does not reach stays as it is."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rgrl.errors import ConfigError
from rgrl.hub import read_json, weight_files
from rgrl.models.names import factor_name, layer_of
from rgrl.models.weights import FLOATS, Stored, check_unquantized, find_weights


@dataclass(frozen=True)
class Update:
    """What a weight of the checkpoint gains: `scale` times B A."""

    stored: Stored
    a_RI: Tensor
    b_OR: Tensor
    scale: float


def plan(base: Path, adapter: Mapping[str, Tensor], scale: float) -> dict[str, Update]:
    """The update of each weight in the folder `base`, by its name there, for an adapter under the checkpoint's names.

    Only headers are read. Raises `ConfigError` for a layer that the checkpoint lacks, for another shape, and for a base
    whose weights are quantized.
    """
    check_unquantized(read_json(base / "config.json"), str(base))
    header = find_weights(base, str(base))
    updates = {}
    for layer in sorted({layer for name in adapter if (layer := layer_of(name)) is not None}):
        a_RI, b_OR = (adapter[factor_name(layer, factor)] for factor in ("lora_A", "lora_B"))
        name, shape = f"{layer}.weight", (b_OR.shape[0], a_RI.shape[1])
        if name not in header:
            raise ConfigError(f"{base} has no tensor {name}, which the adapter changes")
        stored = header[name]
        if stored.shape != shape:
            raise ConfigError(f"{base}: {name} has shape {stored.shape}, and the adapter's update {shape}")
        if stored.dtype not in FLOATS:
            raise ConfigError(f"{base}: {name} is stored as {stored.dtype}, so nothing can be merged into it")
        updates[name] = Update(stored, a_RI, b_OR, scale)
    return updates


def merged(weight_OI: Tensor, update: Update) -> Tensor:
    """weight + scale B A, computed in float32 (float64 where the weight is), rounded to the weight's own dtype."""
    kind = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    product_OI = update.b_OR.to(kind) @ update.a_RI.to(kind)
    return (weight_OI.to(kind) + update.scale * product_OI).to(weight_OI.dtype)


def write_merged(base: Path, output: Path, updates: Mapping[str, Update]) -> None:
    """Copy the weight files in `base` and their index to the folder `output`, and rewrite the updated weights there.

    One weight is in memory at a time. Raises `OSError`, and `ConfigError` for a sum beyond what the dtype can hold.
    """
    for file in weight_files(base):
        shutil.copyfile(base / file, output / file)
        own = {name: update for name, update in updates.items() if update.stored.path.name == file}
        if own:
            _rewrite(output / file, own)
    if weight_files(base) != ["model.safetensors"]:
        shutil.copyfile(base / "model.safetensors.index.json", output / "model.safetensors.index.json")


def _rewrite(path: Path, updates: Mapping[str, Update]) -> None:
    with path.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        for name, update in updates.items():
            start, end = (8 + length + offset for offset in header[name]["data_offsets"])
            handle.seek(start)
            content = bytearray(handle.read(end - start))
            weight_OI = torch.frombuffer(content, dtype=FLOATS[update.stored.dtype]).view(update.stored.shape)
            result_OI = merged(weight_OI, update)
            if not bool(result_OI.isfinite().all()):
                raise ConfigError(f"{name}: with the adapter it holds values beyond {update.stored.dtype}")
            handle.seek(start)
            handle.write(result_OI.contiguous().view(torch.uint8).numpy().data)
