"""Sudoku: a grid that keeps what was given, with every digit once in each row, column and box."""

import re
from collections.abc import Mapping
from typing import Any

from rgrl.config.kinds import Flag, Text
from rgrl.rewards.verifiers.answers import Where, marked
from rgrl.rewards.verifiers.base import BadRowError, Verifier, own_settings, shown

BOXES = {16: 2, 81: 3}  # cells -> rows of a box
_RUN = re.compile(r"[0-9](?:[\s|,;+\-\[\]]*[0-9])*")


@own_settings
class SudokuSettings:
    puzzle: Text = "puzzle"
    """Column with the puzzle: 16 or 81 digits row by row, 0 or . where a cell is empty, as a text or as lists."""
    solution: Text = "solution"
    """Column with the solved grid; only `partial` reads it."""
    where: Where = "auto"
    """Where the completion's grid stands: `tags` (<answer>), `boxed`, `hashes` (####), `text`, or `auto`: the first of
    the marks that there is, else the last digits of the completion that are as many as the grid's."""
    partial: Flag = False
    """Pay the fraction of empty cells that are filled as in the solution, where what was given is kept (d1)."""


def cells_of(value: Any, column: str) -> str:
    """A grid as 16 or 81 digits. Raises `BadRowError`."""
    if isinstance(value, list | tuple):
        flat = [cell for line in value for cell in (line if isinstance(line, list | tuple) else [line])]
        value = "".join(map(_cell, flat))
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**16:
        value = str(value).zfill(16)  # a file of numbers drops the 0s that it begins with
    if isinstance(value, str):
        cells = re.sub(r"[\s|,]", "", value).replace(".", "0").replace("_", "0")
        if len(cells) in BOXES and cells.isascii() and cells.isdigit() and int(max(cells)) <= BOXES[len(cells)] ** 2:
            return cells
    raise BadRowError(f"{column!r} is {shown(value)}, which is no grid of 16 or 81 digits")


def _cell(value: Any) -> str:
    """A cell, or some of them as text; what is none makes the grid none."""
    if isinstance(value, str):
        return value
    digit = isinstance(value, int | float) and not isinstance(value, bool) and value in range(10)
    return str(int(value)) if digit else "?"


def units(cells: int) -> list[list[int]]:
    """Rows, columns and boxes, as numbers of cells."""
    box = BOXES[cells]
    side = box * box
    rows = [[r * side + c for c in range(side)] for r in range(side)]
    columns = [[r * side + c for r in range(side)] for c in range(side)]
    starts = [(r, c) for r in range(0, side, box) for c in range(0, side, box)]
    boxes = [[(r + i) * side + c + j for i in range(box) for j in range(box)] for r, c in starts]
    return rows + columns + boxes


def read_sudoku(row: Mapping[str, Any], settings: Any) -> tuple[str, str | None] | None:
    value = row.get(settings.puzzle)
    if value is None:
        return None
    puzzle = cells_of(value, settings.puzzle)
    for unit in units(len(puzzle)):
        given = [puzzle[i] for i in unit if puzzle[i] != "0"]
        if len(set(given)) < len(given):
            raise BadRowError(f"{settings.puzzle!r} is {shown(puzzle)}, which has no solution")
    if not settings.partial:
        return puzzle, None
    if row.get(settings.solution) is None:
        return None
    solution = cells_of(row[settings.solution], settings.solution)
    if len(solution) != len(puzzle) or not _solves(puzzle, solution):
        raise BadRowError(f"{settings.solution!r} is {shown(solution)}, which does not solve {puzzle!r}")
    return puzzle, solution


def _solves(puzzle: str, grid: str) -> bool:
    kept = all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True))
    digits = {str(d + 1) for d in range(BOXES[len(puzzle)] ** 2)}
    return kept and all({grid[i] for i in unit} == digits for unit in units(len(puzzle)))


def score_sudoku(completion: str, expected: tuple[str, str | None], settings: Any) -> float:
    puzzle, solution = expected
    part = marked(completion, settings.where)
    if part is None and settings.where != "auto":
        return 0.0
    found = None
    if part is not None:
        found = "".join(c for c in part if c in "0123456789")
    else:
        runs = (re.sub("[^0-9]", "", run[0]) for run in _RUN.finditer(completion))
        for run in runs:
            found = run if len(run) == len(puzzle) else found
    if found is None or len(found) != len(puzzle):
        return 0.0
    if solution is None:
        return float(_solves(puzzle, found))
    if any(given not in ("0", cell) for given, cell in zip(puzzle, found, strict=True)):
        return 0.0
    empty = [i for i, given in enumerate(puzzle) if given == "0"]
    return sum(found[i] == solution[i] for i in empty) / len(empty) if empty else 1.0


SUDOKU = Verifier(
    SudokuSettings,
    read_sudoku,
    score_sudoku,
    lambda settings: [settings.puzzle, *([settings.solution] if settings.partial else [])],
)
