"""Which prompts a step gets, and the files they come from."""

import csv
import json
from collections import Counter

import datasets
import pytest

from rgrl.config import DataConfig
from rgrl.data import PromptStream, load_prompts
from rgrl.errors import ConfigError
from rgrl.types import Prompts

TEXTS = ["a line\u2028separator", 'with "quotes", commas', "café, naïve ☃", "  indented", "two\tcells", "the last"]
ROWS = [{"prompt": text, "answer": i} for i, text in enumerate(TEXTS)]


def numbered(n: int) -> Prompts:
    return Prompts([f"prompt {i}" for i in range(n)], [{"i": i} for i in range(n)])


def drawn(n: int, per_rank: int, ranks: int, steps: int, seed: int = 0) -> list[str]:
    """The prompts of the first steps in the order of ranks."""
    streams = [PromptStream(numbered(n), seed, per_rank, ranks) for _ in range(ranks)]
    return [text for step in range(steps) for rank in range(ranks) for text in streams[rank].batch(step, rank).texts]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("per_rank", [1, 2, 5])
def test_every_prompt_comes_once_an_epoch_for_any_number_of_ranks(per_rank, ranks):
    n = 7  # divides none of the batches, so epochs end within a batch
    texts = drawn(n, per_rank, ranks, steps=30)
    epochs = [texts[i : i + n] for i in range(0, len(texts) - n + 1, n)]
    assert len(epochs) >= 4
    assert all(Counter(epoch) == Counter(numbered(n).texts) for epoch in epochs)


def test_ranks_divide_the_prompts_of_one_process():
    assert drawn(7, per_rank=4, ranks=1, steps=9) == drawn(7, per_rank=2, ranks=2, steps=9)
    assert drawn(7, per_rank=4, ranks=1, steps=9) == drawn(7, per_rank=1, ranks=4, steps=9)


def test_batch_does_not_depend_on_earlier_calls():
    in_order = PromptStream(numbered(7), 0, 3, 2)
    expected = {(step, rank): in_order.batch(step, rank) for step in range(12) for rank in range(2)}
    backwards = PromptStream(numbered(7), 0, 3, 2)
    assert {key: backwards.batch(*key) for key in reversed(expected)} == expected
    assert {key: PromptStream(numbered(7), 0, 3, 2).batch(*key) for key in expected} == expected


def test_order_changes_with_epoch_and_seed():
    texts = drawn(20, per_rank=2, ranks=1, steps=20)
    assert texts[:20] != texts[20:]
    assert texts[:20] != numbered(20).texts
    assert texts != drawn(20, per_rank=2, ranks=1, steps=20, seed=1)


def test_rows_and_inputs_stay_with_their_texts():
    batch = PromptStream(numbered(5).formatted(str.upper), 0, 4, 1).batch(3, 0).repeat(2)
    assert batch.texts == [f"prompt {row['i']}" for row in batch.rows] and len(batch) == 8
    assert batch.inputs == [text.upper() for text in batch.texts] and numbered(2).inputs == numbered(2).texts


def test_fewer_prompts_than_a_batch_are_repeated():
    assert Counter(PromptStream(numbered(2), 0, 6, 1).batch(0, 0).texts) == {"prompt 0": 3, "prompt 1": 3}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_text_file_has_one_prompt_a_line_and_no_byte_order_mark(encoding, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo ☃\n   \nthree", encoding=encoding)
    assert load_prompts(str(path), DataConfig()).texts == ["one", "two ☃", "three"]


def write_jsonl(path):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


def write_json(path):
    path.write_text(json.dumps(ROWS), encoding="utf-8")


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    datasets.Dataset.from_list(ROWS).to_parquet(path)


def write_saved(path):
    datasets.Dataset.from_list(ROWS).save_to_disk(path)


def write_saved_splits(path):
    other = datasets.Dataset.from_dict({"prompt": ["of another split"]})
    datasets.DatasetDict({"test": other, "train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)


FORMATS = {
    "prompts.jsonl": write_jsonl,
    "prompts.json": write_json,
    "prompts.csv": write_csv,
    "prompts.parquet": write_parquet,
    "saved": write_saved,
    "saved_splits": write_saved_splits,
}


@pytest.mark.parametrize(("name", "write"), FORMATS.items())
def test_formats_give_the_same_prompts_and_rows(name, write, tmp_path):
    write(tmp_path / name)
    prompts = load_prompts(str(tmp_path / name), DataConfig())
    assert prompts.texts == TEXTS
    assert prompts.rows == ROWS


def test_split_of_a_saved_data_set(tmp_path):
    write_saved_splits(tmp_path / "saved")
    assert load_prompts(str(tmp_path / "saved"), DataConfig(split="test")).texts == ["of another split"]


def test_a_file_changed_in_place_is_read_again(tmp_path):
    path = tmp_path / "prompts.json"
    for text in ("before", "after, and longer"):
        path.write_text(json.dumps([{"prompt": text}]))
        assert load_prompts(str(path), DataConfig()).texts == [text]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chat_messages_may_give_their_first_user_turn(suffix, tmp_path):
    turns = [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}],
        [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}, {"role": "user", "content": "?"}],
    ]
    path = tmp_path / f"chat.{suffix}"
    rows = datasets.Dataset.from_list([{"messages": t} for t in turns])
    rows.to_parquet(path) if suffix == "parquet" else rows.to_json(path)
    assert load_prompts(str(path), DataConfig(column="messages", turns="first_user")).texts == ["why?", "how?"]


def test_chat_without_a_user_turn_is_refused(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "hello"}]}) + "\n")
    with pytest.raises(ConfigError, match="row 0 has no prompt text"):
        load_prompts(str(path), DataConfig(column="messages"))
