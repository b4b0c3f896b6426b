"""Random numbers that depend on nothing but what they are for.

The global generator is never used to decide anything, so a resumed run, a skipped evaluation or another
library's draw cannot change what a run does. What is drawn for a row of a batch belongs to the row, not to the
process that works on it, so the number of processes changes nothing either.
"""

import hashlib
from collections.abc import Iterable

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
