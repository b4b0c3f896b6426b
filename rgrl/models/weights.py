"""Tensors in safetensors files: what the headers say, and values that are numbers."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rgrl.errors import ConfigError
from rgrl.hub import read_index, weight_files

# What a model's numbers may be stored as. All are cast to the dtype that is asked for, as transformers does.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LAYER_COUNTS = frozenset(
    "num_hidden_layers n_layers n_layer num_layers encoder_layers decoder_layers num_decoder_layers".split()
)
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as its header describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it: F32, BF16, I64, F8_E4M3, ...


def read_header(path: Path, what: str | None = None) -> dict[str, Stored]:
    """The tensors of one file by name, from a few KB of it. `what` names the file's owner in errors.

    Raises `ConfigError` for an unreadable or cut file.
    """
    # Not by `safe_open`, which maps the whole file: a large one does not fit into some machines' address space.
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError("its header is cut")
            entries = json.loads(file.read(length))
        return _entries(entries, path, size - 8 - length)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(_unreadable(path, what, error)) from error


def _entries(entries: dict[str, Any], path: Path, room: int) -> dict[str, Stored]:
    """Raises `ValueError` and others unless tensors lie one behind another and fill `room` bytes."""
    found, spans = {}, []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        shape, dtype, (start, end) = tuple(entry["shape"]), str(entry["dtype"]), entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise ValueError(f"{name} has no shape")
        if dtype in FLOATS and math.prod(shape) * FLOATS[dtype].itemsize != end - start:
            raise ValueError(f"{name} is not as long as its shape")
        found[name] = Stored(path, shape, dtype)
        spans.append((start, end))
    spans.sort()
    if [start for start, _ in spans] != [0, *(end for _, end in spans)][: len(spans)]:
        raise ValueError("there are gaps between its tensors")
    if (end := max((end for _, end in spans), default=0)) != room:
        raise ValueError(f"it holds {room} bytes of tensors and not {end}")
    return found


def read_tensors(path: Path, what: str | None = None) -> dict[str, Tensor]:
    """All tensors of one file, on the CPU. Raises `ConfigError` as `read_header`."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(_unreadable(path, what, error)) from error


def _unreadable(path: Path, what: str | None, error: Exception) -> str:
    return f"{what + ': ' if what else ''}{path} is not a readable safetensors file: {error}"


def check_floats(header: dict[str, Stored], what: str) -> None:
    """Refuse tensors of integers, fp8 or complex numbers: `what` names the file or folder. Raises `ConfigError`."""
    for name, stored in header.items():
        if stored.dtype not in FLOATS:
            raise ConfigError(
                f"{what}: {name} is stored as {stored.dtype}, which is no plain floating-point format; expected "
                f"{', '.join(FLOATS)} (quantized weights have to be dequantized first)"
            )


@torch.no_grad()
def check_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Refuse NaN and infinite values, naming the tensor. Raises `ConfigError`."""
    for name, tensor in tensors.items():
        tensor = tensor.float() if tensor.dtype == torch.float64 else tensor  # what it is cast to at the most
        # A sum is not finite if one of its terms is not, and takes a tenth of the time of a look at each value, 0.1 s
        # for a GB. It can also overflow, so look at each value then.
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
            raise ConfigError(f"{what}: {name} holds {kind} values")


def find_weights(folder: Path, what: str) -> dict[str, Stored]:
    """The tensors of a checkpoint by name, from the headers of its files (`weight_files`). `what` begins errors.

    Raises `ConfigError` for files that are missing, unreadable or cut, and where an index and its files disagree.
    """
    names = weight_files(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        told = f" ({pickles[0]} may be a pickle, which is never opened)" if pickles else ""
        expected = ", ".join(missing) or "model.safetensors or model.safetensors.index.json"
        raise ConfigError(f"{what} has no weights: expected {expected}{told}")
    if names == ["model.safetensors"]:
        return read_header(folder / names[0], f"{what} cannot be loaded")
    places = read_index(folder / "model.safetensors.index.json")
    found: dict[str, Stored] = {}
    for file in names:
        for tensor, stored in read_header(folder / file, f"{what} cannot be loaded").items():
            if places.get(tensor) != file:
                told = f"in {places[tensor]}" if tensor in places else "nowhere"
                raise ConfigError(f"{what}: {tensor} is in {file}, and {told} by model.safetensors.index.json")
            found[tensor] = stored
    if absent := sorted(places.keys() - found.keys()):
        raise ConfigError(
            f"{what}: {absent[0]} is not in {places[absent[0]]}, as model.safetensors.index.json says "
            f"({len(absent)} such tensors)"
        )
    return found


def layer_numbers(names: Iterable[str]) -> set[int]:
    """The numbers of the layers that tensors belong to: the first number in each name, as in `model.layers.3.mlp`."""
    found = (re.search(r"(?:^|\.)(\d+)\.", name) for name in names)
    return {int(number[1]) for number in found if number}


def check_layer_count(raw: dict[str, Any], most: int, what: str) -> None:
    """Refuse a config.json that counts more than `most` layers, before a class spends its time on them.

    Raises `ConfigError`.
    """
    for config in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for name, value in config.items():
            if name in _LAYER_COUNTS and type(value) is int and value > most:
                raise ConfigError(
                    f"{what}: `{name}` is {value} in config.json, and the weights have at most {most} layers"
                )


def check_unquantized(raw: dict[str, Any], what: str) -> None:
    """Refuse a config.json that says that the weights are not plain numbers. Raises `ConfigError`."""
    for name in ("quantization_config", "compression_config"):
        if raw.get(name):
            method = raw[name].get("quant_method") if isinstance(raw[name], dict) else None
            raise ConfigError(
                f"{what} is quantized (`{name}`{f': {method}' if method else ''} in config.json), which is not "
                "supported: use the original checkpoint"
            )
