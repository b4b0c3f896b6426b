"""Random numbers that depend only on their purpose.

Nothing here uses the global generators, so a resumed run, a skipped evaluation or another library's draw cannot change
a run. Numbers drawn for a row of a batch belong to the row and not to the process that works on it, so the number of
processes changes nothing either. A user's own reward or objective may still use the global generators: `seed_globals`
sets them and `global_state` is what a checkpoint stores.
"""

import hashlib
import random
from collections.abc import Iterable
from typing import Any

import numpy
import torch


def generator(seed: int, step: int, row: int, purpose: str) -> torch.Generator:
    """A fresh CPU generator for one purpose ("rollout", "noise", ...) of one row (or rank) at one step."""
    digest = hashlib.sha256(f"{seed}/{step}/{row}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def generators(seed: int, step: int, rows: Iterable[int], purpose: str) -> list[torch.Generator]:
    """One `generator` for each of `rows`, which are numbered over all processes."""
    return [generator(seed, step, row, purpose) for row in rows]


def row_keys(seed: int, step: int, rows: Iterable[int], purpose: str) -> torch.Tensor:
    """One int32 for each of `rows`, for code that draws from a key instead of a generator (dropout)."""
    seeds = [g.initial_seed() for g in generators(seed, step, rows, purpose)]
    return torch.tensor([value % 2**31 for value in seeds], dtype=torch.int32)


def seed_globals(seed: int, step: int, rank: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices) for this rank at this step."""
    value = generator(seed, step, rank, "global").initial_seed()
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)


def global_state() -> dict[str, Any]:
    """The state of those generators, and of the current CUDA device if there is one, in types that torch can save."""
    version, words, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state()
    state = {"python": (version, torch.tensor(words), gauss), "torch": torch.get_rng_state()}
    state["numpy"] = (name, torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)), *rest)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_global_state(state: dict[str, Any]) -> None:
    """Restore what `global_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def try_state(state: dict[str, Any]) -> None:
    """Raise something unless `set_global_state` can take this; nothing is changed."""
    version, words, gauss = state["python"]
    random.Random().setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.RandomState().set_state((name, keys.numpy().astype(numpy.uint32), *rest))
    torch.Generator().set_state(state["torch"])
