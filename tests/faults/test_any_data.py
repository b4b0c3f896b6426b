"""Whatever a data file holds, it is prompts with text, counted bad rows, or one clear line: never another error."""

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rgrl.config import DataConfig, ModelConfig
from rgrl.data import fingerprint, fit, load_prompts
from rgrl.errors import ConfigError
from rgrl.models.load import load_reader
from rgrl.models.reader import Reader

SLOW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(SLOW, max_examples=6)
TEXT = st.text(st.characters(), max_size=40)  # half surrogate pairs too
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.integers(10**30, 10**40)
VALUE = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
TURN = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["system", "user", "assistant", "tool"]) | VALUE, "content": TEXT | VALUE}
)
ROW = st.fixed_dictionaries({}, optional={"prompt": TEXT | st.lists(TURN, max_size=4) | VALUE, "answer": VALUE})
NESTED = st.integers(1, 3000).map(lambda n: '{"prompt": "deep", "x": ' + "[" * n + "]" * n + "}")
HUGE = st.integers(1, 9000).map(lambda n: '{"prompt": "huge", "x": ' + "9" * n + "}")
LINE = ROW.map(json.dumps) | ROW.map(lambda row: json.dumps(row, ensure_ascii=False)) | NESTED | HUGE | TEXT


@pytest.fixture(scope="module")
def reader(llada_dir) -> Reader:
    return load_reader(ModelConfig(path=str(llada_dir)))


def outcome(name: str, content: bytes, reader: Reader, **options: object) -> None:
    """Load, fit and read all; every prompt has text, every row is counted, and an error is one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        config = DataConfig(**({"max_bad": 0.99, "max_prompt_length": 30} | options))
        try:
            prompts = fit(load_prompts(str(path), config), reader, 4)
        except ConfigError as error:
            message = str(error)
            message.encode()
            assert folder in message and len(message) < 1500
            return
        t = prompts.tally
        assert len(prompts) == t.rows - t.bad - t.elsewhere - t.duplicates - t.short - t.dropped > 0
        assert bool(t.bad) == bool(t.first_bad)
        batch = prompts.take(range(len(prompts)))
        for text, shown, row in zip(batch.texts, batch.inputs, batch.rows, strict=True):
            text.encode()
            assert text.strip() and shown.strip() and isinstance(row, dict)
        assert fingerprint(prompts) == fingerprint(batch)
        assert max(reader.lengths(batch.inputs)) <= 30


@SLOW
@given(lines=st.lists(LINE, max_size=8), drop=st.sampled_from(["drop", "truncate", "error"]), turns=st.booleans())
def test_any_lines(lines, drop, turns, reader):
    content = "\n".join(lines).encode(errors="surrogatepass")
    outcome("a.jsonl", content, reader, too_long=drop, turns="all" if turns else "first_user")
    outcome("a.txt", content, reader, too_long=drop, deduplicate=turns)


@SLOW
@given(content=st.binary(max_size=200), suffix=st.sampled_from(["jsonl", "txt"]))
def test_any_bytes(content, suffix, reader):
    outcome(f"a.{suffix}", content, reader, too_long="truncate")


@SLOW
@given(row=ROW, template=st.sampled_from(["{prompt}", "{answer}!", "a {prompt} {{{answer}}}"]), system=st.none() | TEXT)
def test_any_row_in_a_template(row, template, system, reader):
    try:
        DataConfig(system=system)
    except ConfigError:
        system = None  # no text in UTF-8
    good = {"prompt": "fine", "answer": 3}
    content = "\n".join(map(json.dumps, [good, row])).encode()
    outcome("a.jsonl", content, reader, template=template, system=system, too_long="drop")


@FEW
@given(rows=st.lists(ROW, min_size=1, max_size=5), suffix=st.sampled_from(["json", "csv"]))
def test_any_rows_that_a_library_reads(rows, suffix, reader):
    text = json.dumps(rows) if suffix == "json" else "prompt,answer\n" + "\n".join(map(json.dumps, rows))
    outcome(f"a.{suffix}", text.encode(errors="surrogatepass"), reader, too_long="drop")


COLUMN = st.one_of(
    st.lists(st.none() | st.text(max_size=20), min_size=3, max_size=3),
    st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3),
    st.lists(st.none() | st.binary(max_size=9), min_size=3, max_size=3),
    st.lists(st.integers(-(2**62), 2**62), min_size=3, max_size=3).map(lambda x: pa.array(x, pa.timestamp("us"))),
    st.lists(st.lists(st.floats()), min_size=3, max_size=3),
    st.lists(st.binary(max_size=9), min_size=3, max_size=3).map(
        lambda x: pa.Array.from_buffers(pa.string(), 3, pa.array(x, pa.binary()).buffers())  # not UTF-8
    ),
)


@FEW
@given(prompt=COLUMN, answer=COLUMN)
def test_any_columns_of_parquet(prompt, answer, reader):
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": prompt, "answer": answer}), buffer)
    outcome("a.parquet", buffer.getvalue().to_pybytes(), reader, too_long="drop")
