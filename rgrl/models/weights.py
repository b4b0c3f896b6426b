"""Tensors in safetensors files: what the headers say, and values that are numbers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rgrl.errors import ConfigError

# What a model's numbers may be stored as. All are cast to the dtype that is asked for, as transformers does.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as its header describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it: F32, BF16, I64, F8_E4M3, ...


def read_header(path: Path, what: str | None = None) -> dict[str, Stored]:
    """The tensors of one file by name, without reading them. `what` names the file's owner in errors.

    Raises `ConfigError` for an unreadable or cut file.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: Stored(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(_unreadable(path, what, error)) from error


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
        # A sum is not finite if one of its terms is not. It can also overflow, so look at each value then.
        total = tensor.sum(dtype=torch.float32)
        if not bool(total.isfinite()) and not bool(tensor.isfinite().all()):
            kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
            raise ConfigError(f"{what}: {name} holds {kind} values")
