"""Columns of tables: values of any kind become plain ones, and nothing of the data hides something of ours."""

import datetime
import decimal
import json
import math

import numpy
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rgrl.folder import new_owner
from rgrl.tracking.columns import LONGEST, OURS, data_columns, parts_of, plain, uniform
from rgrl.tracking.tables import Tables

LOOP: list = []
LOOP.append(LOOP)
DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (2**63 - 1, 2**63 - 1),
        (2**63, str(2**63)),
        (0.5, 0.5),
        (math.nan, None),
        (-math.inf, "-inf"),
        ("text", "text"),
        ("half \ud800", "half \\ud800"),
        ([1, {"a": None}], '[1, {"a": null}]'),
        ({"role": "user", "content": "ü"}, '{"role": "user", "content": "ü"}'),
        (b"12345", "<5 bytes>"),
        ([b"12345", {1}], '["<5 bytes>", "<set>"]'),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (decimal.Decimal("1.5"), "1.5"),
        (object(), "<object>"),
        (numpy.int64(3), 3),
        (numpy.float32(0.25), 0.25),
        (numpy.float64("nan"), None),
        (numpy.array([1, 2]), "[1, 2]"),
        (torch.tensor(2.0), 2.0),
        ({(1, 2): 3}, "<dict>"),
        (LOOP, "<list>"),
        (DEEP, "<list>"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_plain_in_a_table(value, expected):
    found = plain(value)
    assert found == expected and type(found) is type(expected)


def test_what_is_long_is_cut_and_says_so():
    for value in ("x" * (LONGEST + 1), ["x" * LONGEST]):
        text = plain(value)
        assert len(text) < LONGEST + 40 and text.endswith(" characters)")
    assert plain("x" * LONGEST) == "x" * LONGEST and len(plain(10**5000)) < 5000


def test_no_column_of_the_data_hides_one_of_ours():
    row = {name: f"data's {name}" for name in (*OURS, "rewards/model", "answer")}
    found = data_columns(row, "question", "the prompt")
    assert not found.keys() & set(OURS) and found["answer"] == "data's answer"
    assert found["data/reward"] == "data's reward" and found["data/rewards/model"] == "data's rewards/model"
    row = {"question": "the prompt", "answer": "the prompt"}
    assert data_columns(row, "question", "the prompt") == {"answer": "the prompt"}
    assert data_columns(row, "prompt", "the prompt") == row and data_columns(row, "question", "another") == row
    turns = [{"role": "user", "content": "the prompt"}]
    assert json.loads(data_columns({"prompt": turns}, "prompt", "the prompt")["data/prompt"]) == turns
    assert data_columns({7: 1}, "prompt", "") == {"7": 1}


def test_parts_have_none_where_there_is_no_reward():
    terms = {"model": torch.tensor([0.5, -1.0]), "exact": torch.tensor([math.nan, 1.0])}
    assert parts_of(terms) == [
        {"rewards/model": 0.5, "rewards/exact": None},
        {"rewards/model": -1.0, "rewards/exact": 1.0},
    ]


def test_rows_get_all_columns_of_one_kind():
    rows = [{"a": 1, "b": "x"}, {"b": 2, "c": True}, {"a": 0.5, "c": None}, {"d": [1]}, {"d": {"e": 1}}]
    assert uniform(rows) == [
        {"a": 1.0, "b": "x", "c": None, "d": None},
        {"a": None, "b": "2", "c": True, "d": None},
        {"a": 0.5, "b": None, "c": None, "d": None},
        {"a": None, "b": None, "c": None, "d": "[1]"},
        {"a": None, "b": None, "c": None, "d": '{"e": 1}'},
    ]
    assert uniform([{"n": 2**60 + 1}, {"n": 0.5}]) == [{"n": str(2**60 + 1)}, {"n": "0.5"}], "no digit is lost"
    assert uniform([{"n": True}, {"n": 1}]) == [{"n": "true"}, {"n": "1"}]


TEXTS = ["", "a", "ü", "\ud800", "a\0b", "\U0001f600", "null", "1"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TEXTS) | st.just(b"\xff"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return Tables(tmp_path_factory.mktemp("tables"), new_owner())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.sampled_from("ab"), ANYTHING), min_size=1, max_size=4), st.booleans())
def test_whatever_a_row_holds_is_a_table_and_lines_of_json(written, rows, of_the_data):
    """Rows of the data are made plain; an evaluator of a user's own may put anything into its table."""
    rows = [{"index": i, **(data_columns(row, "prompt", "") if of_the_data else row)} for i, row in enumerate(rows)]
    if of_the_data:
        assert all(json.loads(json.dumps(row, allow_nan=False)) == row for row in rows)
    assert written.write(0, "x", uniform(rows)) is None
    found = pq.read_table(written.folder / "x_000000.parquet").to_pylist()
    assert [row["index"] for row in found] == list(range(len(rows)))
    if of_the_data:
        assert all(set(found[0]) >= set(row) for row in rows)
