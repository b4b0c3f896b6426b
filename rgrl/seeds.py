"""Random numbers that depend on nothing but what they are for.

The global generator is never used to decide anything, so a resumed run, a skipped evaluation or another
library's draw cannot change what a run does.
"""

import hashlib

import torch


def generator(seed: int, step: int, rank: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` for one purpose ("rollout", "noise", ...) at one step on one rank."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}/{purpose}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
