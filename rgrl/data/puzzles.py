"""Puzzles made from a seed: numbers to reach a target with, and sudokus of four by four.

The tasks are those of TinyZero (github.com/Jiayi-Pan/TinyZero) and d1 (arXiv 2504.12216); the wording is our own.
"""

from collections.abc import Callable
from functools import cache
from itertools import permutations
from random import Random
from typing import Any

from rgrl.errors import ConfigError

MOST_TRIES = 2000  # for a puzzle that is not among those before it; more means that there are hardly any left
LARGEST_NUMBER, LEAST_TARGET, LARGEST_TARGET = 99, 10, 100
FEWEST_BLANKS, MOST_BLANKS = 5, 10

COUNTDOWN = (
    "Use the numbers {numbers} to make {target}. Use each of them exactly once, with +, -, *, / and parentheses. "
    "Reason first, then write the expression alone, without an equals sign, between <answer> and </answer>, as in "
    "<answer>(1 + 2) * 3</answer>."
)
SUDOKU = (
    "Solve this sudoku of 4 rows, 4 columns and four boxes of 2x2: each of them holds 1, 2, 3 and 4 once. A 0 is an "
    "empty cell.\n{grid}\nReason first, then write the 16 digits of the solved grid, row by row and without spaces, "
    "between <answer> and </answer>."
)


def make(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` puzzles, no two alike: the same for the same arguments everywhere, and row i whatever `count` is.

    `countdown`: `prompt`, `numbers` (3 or 4 of 1 ... 99), `target` (10 ... 100), and a `solution` as an expression.
    `sudoku4`: `prompt`, `puzzle` and `solution`, 16 digits each, 0 for an empty cell; there is no other solution.
    Raises `ConfigError` for an unknown kind, and where there are not so many puzzles.
    """
    if kind not in KINDS:
        raise ConfigError(f"no puzzles of the kind {kind!r}; known: {', '.join(KINDS)}")
    rows: list[dict[str, Any]] = []
    seen: set[Any] = set()
    for i in range(count):
        random = Random(f"{kind} {seed} {i}")  # seeded by the text's SHA-512, not by Python's own hash
        for _ in range(MOST_TRIES):
            found = KINDS[kind](random)
            if found is not None and found[0] not in seen:
                break
        else:
            raise ConfigError(f"{count:,} {kind} puzzles are more than can be made without repeating one ({i:,} were)")
        seen.add(found[0])
        rows.append(found[1])
    return rows


def _below(random: Random, limit: int) -> int:
    """A whole number 0 ... limit - 1. Of Python's generator only `random()` is the same in all versions."""
    return int(random.random() * limit)


# ------------------------------------------------------------------------------------------------ countdown
def _countdown(random: Random) -> tuple[Any, dict[str, Any]] | None:
    """(what tells it from others, row); None where the drawn operations end outside the targets."""
    numbers = [1 + _below(random, LARGEST_NUMBER) for _ in range(3 + _below(random, 2))]
    terms: list[tuple[int, Any]] = [(number, number) for number in numbers]  # value, and how it is made
    while len(terms) > 1:
        one, other = terms.pop(_below(random, len(terms))), terms.pop(_below(random, len(terms)))
        big, small = (one, other) if one[0] >= other[0] else (other, one)
        sign, value = "+-*/"[_below(random, 4)], 0
        if sign == "+":
            value = big[0] + small[0]
        elif sign == "-":
            value = big[0] - small[0]
        elif sign == "*":
            value = big[0] * small[0]
        elif small[0] == 0 or big[0] % small[0]:
            return None
        else:
            value = big[0] // small[0]
        terms.append((value, (big[1], sign, small[1])))
    target, tree = terms[0]
    if not LEAST_TARGET <= target <= LARGEST_TARGET or target in numbers:
        return None
    prompt = COUNTDOWN.format(numbers=", ".join(map(str, numbers)), target=target)
    row = {"prompt": prompt, "numbers": numbers, "target": target, "solution": _written(tree)[1:-1]}
    return (tuple(sorted(numbers)), target), row


def _written(tree: Any) -> str:
    return f"({_written(tree[0])} {tree[1]} {_written(tree[2])})" if isinstance(tree, tuple) else str(tree)


# ------------------------------------------------------------------------------------------------ sudoku
@cache
def _grids() -> tuple[list[str], list[list[int]]]:
    """All 288 solved grids; and for each of them by cell, as bits, the grids that have the same digit there."""
    lines = ["".join(line) for line in permutations("1234")]
    found: list[str] = []

    def extend(grid: str) -> None:
        if len(grid) == 16:
            found.append(grid)
            return
        for line in lines:
            columns = all(line[c] not in grid[c::4] for c in range(4))
            boxes = len(grid) % 8 == 0 or all({*grid[-4:][c : c + 2]}.isdisjoint(line[c : c + 2]) for c in (0, 2))
            if columns and boxes:
                extend(grid + line)

    extend("")
    having: dict[tuple[int, str], int] = {}
    for number, grid in enumerate(found):
        for place in enumerate(grid):
            having[place] = having.get(place, 0) | 1 << number
    return found, [[having[place] for place in enumerate(grid)] for grid in found]


def _sudoku4(random: Random) -> tuple[Any, dict[str, Any]]:
    """(what tells it from others, row): cells of a solved grid emptied in a random order while one solution is left."""
    grids, alike = _grids()
    number = _below(random, len(grids))
    solution, like = grids[number], alike[number]
    blanks = FEWEST_BLANKS + _below(random, MOST_BLANKS - FEWEST_BLANKS + 1)
    given = set(range(16))
    for cell in sorted(range(16), key=lambda cell: random.random()):
        if len(given) == 16 - blanks:
            break
        possible = -1
        for other in given:
            if other != cell:
                possible &= like[other]
        if possible == 1 << number:
            given.remove(cell)
    puzzle = "".join(digit if cell in given else "0" for cell, digit in enumerate(solution))
    shown = "\n".join(" ".join(puzzle[start : start + 4]) for start in range(0, 16, 4))
    return puzzle, {"prompt": SUDOKU.format(grid=shown), "puzzle": puzzle, "solution": solution}


KINDS: dict[str, Callable[[Random], tuple[Any, dict[str, Any]] | None]] = {
    "countdown": _countdown,
    "sudoku4": _sudoku4,
}
