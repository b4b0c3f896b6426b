"""Puzzles made from a seed: solvable, no two alike, and the same everywhere."""

import hashlib
import json
from fractions import Fraction
from itertools import product

import pytest

from rgrl.data.puzzles import make
from rgrl.errors import ConfigError


def test_countdown_puzzles_can_be_solved_with_their_numbers():
    for row in make("countdown", 300, 3):
        tree = row["solution"].replace("(", " ").replace(")", " ").split()
        assert sorted(int(word) for word in tree if word.isdigit()) == sorted(row["numbers"])
        # Numbers become fractions before Python itself computes what this test file made.
        exact = "".join(f"Fraction({word})" if word.isdigit() else word for word in split(row["solution"]))
        assert eval(exact, {"Fraction": Fraction}) == row["target"]
        assert len(row["numbers"]) in (3, 4) and 10 <= row["target"] <= 100
        assert all(str(number) in row["prompt"] for number in (*row["numbers"], row["target"]))


def split(expression):
    spaced = "".join(f" {c} " if c in "()+-*/" else c for c in expression)
    return spaced.split()


def solutions(puzzle):
    """Every solution of a sudoku of 4x4, by trying every line that fits."""
    lines = [[d for d in "1234" if c in ("0", d)] for c in puzzle]
    rows = [[r for r in product(*lines[4 * i : 4 * i + 4]) if len({*r}) == 4] for i in range(4)]
    found = []
    for grid in product(*rows):
        columns = all(len({row[c] for row in grid}) == 4 for c in range(4))
        boxes = all(len({grid[i + a][j + b] for a in (0, 1) for b in (0, 1)}) == 4 for i in (0, 2) for j in (0, 2))
        if columns and boxes:
            found.append("".join("".join(row) for row in grid))
    return found


def test_sudokus_have_the_one_solution():
    for row in make("sudoku4", 60, 5):
        assert solutions(row["puzzle"]) == [row["solution"]]
        assert 5 <= row["puzzle"].count("0") <= 10
        assert " ".join(row["puzzle"][:4]) in row["prompt"]


@pytest.mark.parametrize("kind", ["countdown", "sudoku4"])
def test_rows_are_distinct_and_depend_on_kind_seed_and_number_only(kind):
    rows = make(kind, 2000, 1)
    assert (
        len({json.dumps([row.get("puzzle"), sorted(row.get("numbers", [])), row.get("target")]) for row in rows})
        == 2000
    )
    assert make(kind, 30, 1) == rows[:30]
    assert make(kind, 30, 2) != rows[:30]


def test_puzzles_are_those_of_other_machines_and_versions():
    """A recorded hash: a recipe's data must not change under a run that is resumed elsewhere."""
    made = json.dumps([make(kind, 200, 0) for kind in ("countdown", "sudoku4")], sort_keys=True)
    assert hashlib.sha256(made.encode()).hexdigest()[:16] == "9294176058efb091"


def test_there_is_an_end_to_puzzles_and_a_line_for_an_unknown_kind(monkeypatch):
    monkeypatch.setattr("rgrl.data.puzzles.LARGEST_NUMBER", 3)
    with pytest.raises(ConfigError, match="more than can be made"):
        make("countdown", 10_000, 0)
    with pytest.raises(ConfigError, match="known: countdown, sudoku4"):
        make("sudoku9", 1, 0)
