"""How many tokens each denoising step commits, and in which block."""

from typing import NamedTuple


class Window(NamedTuple):
    """One denoising step: it commits `commit` of the `hidden` tokens at places `first` ... `end` - 1 of a row."""

    first: int
    end: int
    hidden: int
    commit: int


def commit_schedule(C: int, T: int) -> list[int]:
    """How many tokens each of T steps commits: the masked fraction falls linearly from 1 to 0; they sum to C."""
    left = [C - (C * t) // T for t in range(T + 1)]
    return [left[t] - left[t + 1] for t in range(T)]


def write_schedule(C: int, T: int, block: int) -> list[Window]:
    """The window of each of T steps. Blocks of `block` tokens from left to right share the steps; 0: one block of C."""
    block = block or C
    n, plan = C // block, []
    for i in range(n):
        hidden = block
        for commit in commit_schedule(block, T * (i + 1) // n - T * i // n):
            plan.append(Window(i * block, (i + 1) * block, hidden, commit))
            hidden -= commit
    return plan
