"""Random numbers that depend on nothing but what they are for.

The global generator is never used to decide anything, so a resumed run, a skipped evaluation or another
library's draw cannot change what a run does. What is drawn for a row of a batch belongs to the row, not to the
process that works on it, so the number of processes changes nothing either.
Somebody's own reward or objective may read the global generators all the same: `seed_globals` sets them, and
`global_state` is what a checkpoint keeps of them.
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
    """One int32 for each of `rows`, for what draws its numbers from a key instead of a generator."""
    seeds = [g.initial_seed() for g in generators(seed, step, rows, purpose)]
    return torch.tensor([value % 2**31 for value in seeds], dtype=torch.int32)


def seed_globals(seed: int, step: int, rank: int) -> None:
    """Set the global generators of Python, NumPy and torch (all devices) to what belongs to this rank at this step."""
    value = generator(seed, step, rank, "global").initial_seed()
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)


def global_state() -> dict[str, Any]:
    """The state of those generators (of the current CUDA device, where there is one), as torch can save it."""
    version, words, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state()
    state = {"python": (version, torch.tensor(words), gauss), "torch": torch.get_rng_state()}
    state["numpy"] = (name, torch.from_numpy(keys.astype(numpy.int64)), *rest)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_global_state(state: dict[str, Any]) -> None:
    """Put back what `global_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
