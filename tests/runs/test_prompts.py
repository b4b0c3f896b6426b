"""What is made of the rows of a data set: chats, templates, filters, lengths, held-out prompts, and what refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from checkpoints import REPO
from training import changed, go, write

from rgrl.cli import main
from rgrl.config import DataConfig, ModelConfig
from rgrl.data import fingerprint, fit, fit_both, load_data, load_prompts
from rgrl.data import rows as rows_module
from rgrl.data.lengths import bound_of, shorten
from rgrl.errors import ConfigError
from rgrl.evaluation import rejudge
from rgrl.models.load import load_reader
from rgrl.models.reader import Reader
from rgrl.rewards import load_classifier
from rgrl.rewards.checkpoint import load_template
from rgrl.rewards.template import InputTemplate
from rgrl.types import Prompts, transcript, turns_of

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "is it good"},
    {"role": "assistant", "content": "it is"},
    {"role": "user", "content": "and the plot"},
]
ANSWERED = [*CHAT, {"role": "assistant", "content": "fine"}]


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts_of(path: Path, *rows: object, **settings: object):
    return load_prompts(lines(path, *rows), DataConfig(**settings))


@pytest.fixture(scope="module")
def reader(llada_dir) -> Reader:
    return load_reader(ModelConfig(path=str(llada_dir)))


@pytest.fixture(scope="module")
def input_template(reward_dir) -> InputTemplate:
    return load_template(str(reward_dir), "reward")[0]


# ------------------------------------------------------------------------------------------------------- chats
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_all_turns_reach_policy_and_reward_model(suffix, tmp_path, reader, input_template):
    path = tmp_path / f"chat.{suffix}"
    if suffix == "jsonl":
        lines(path, {"m": ANSWERED}, {"m": CHAT[1:2]})
    else:
        datasets.Dataset.from_list([{"m": ANSWERED}, {"m": CHAT[1:2]}]).to_parquet(path)
    prompts = load_prompts(str(path), DataConfig(column="m"))
    assert prompts.shapes == {("system", "user", "assistant", "user"): 0}
    chat, plain = prompts.take([0, 1]).chats
    assert (chat, plain) == (CHAT, "is it good"), "an answer at the end is no part of the prompt"
    shown = reader.format_prompt(chat)
    before, _ = input_template.around(chat)
    for text in (shown, input_template.tokenizer.decode(before.ids)):
        places = [text.find(turn["content"]) for turn in CHAT]
        assert -1 not in places and places == sorted(places)
    assert "assistant" in shown[shown.find("and the plot") :], "the answer begins there"
    assert prompts.texts[0] == transcript(CHAT) and all(turn["content"] in prompts.texts[0] for turn in CHAT)


def test_a_single_user_turn_is_what_its_text_is(tmp_path, reader, input_template):
    chat = prompts_of(tmp_path / "a.jsonl", {"m": CHAT[1:2]}, column="m")
    plain = prompts_of(tmp_path / "b.jsonl", {"m": "is it good"}, column="m")
    assert fingerprint(chat)["prompts"] == fingerprint(plain)["prompts"]
    assert reader.format_prompt(chat.take([0]).chats[0]) == reader.format_prompt("is it good")
    assert input_template.encode(chat.take([0]).chats[0], "yes") == input_template.encode("is it good", "yes")


def test_scores_and_guidance_read_the_chat(reward_dir):
    """As the tokenizer's own template writes it, and not as its last turn."""
    reward = load_classifier(reward_dir)
    own = reward.tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": "yes"}], tokenize=False)
    texts = [transcript(CHAT), "and the plot"]
    both = Prompts(texts, [{}, {}], chats=[CHAT, "and the plot"])
    score = reward.score(both, ["yes", "yes"]).reward_B
    assert reward.template.encode(CHAT, "yes").ids == reward.tokenizer(own, add_special_tokens=False)["input_ids"]
    assert score[0] != score[1]
    before, after = reward.template.around(CHAT)
    ids = reward.tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert before.ids + ids + after.ids == reward.template.encode(CHAT, "yes").ids


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no user turn"),
        (CHAT[:1], "no user turn"),
        ([{"role": "tool", "content": "x"}], "the role 'tool'"),
        ([{"role": "user", "content": None}], "a content of the type NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], "not text"),
        ([*CHAT[1:3], *CHAT[:2]], "the system's, which can only be the first"),
        ([*CHAT[:3], {"role": "user", "content": " "}], "has no prompt text: that is in the user turn"),
        (["text"], "message 0 is of the type str"),
        ([{"role": ["user"], "content": "x"}], "the role"),
    ],
)
def test_a_chat_that_is_none_is_a_bad_row(messages, words, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(words)):
        prompts_of(tmp_path / "a.jsonl", {"m": CHAT}, {"m": messages}, column="m")


def test_a_first_turn_that_is_no_text_does_not_make_the_second_the_first(tmp_path):
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}
    later = [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "and its colour"}]
    good = [{"role": "tool", "content": "x"}, {"role": "user", "content": "hello"}, *later]
    settings = {"turns": "first_user", "max_bad": 0.5}
    prompts = prompts_of(tmp_path / "a.jsonl", {"prompt": [picture, *later]}, {"prompt": good}, **settings)
    assert prompts.texts == ["hello"] and "message 0 has parts that are not text" in prompts.tally.first_bad


def test_messages_may_be_written_in_other_ways(tmp_path):
    sharegpt = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}, {"from": "human", "value": "how"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "y"}]}]
    [chat, text] = prompts_of(tmp_path / "a.jsonl", {"m": sharegpt}, {"m": parts}, column="m").take([0, 1]).chats
    assert [turn["role"] for turn in chat] == ["user", "assistant", "user"] and chat[0]["content"] == text == "why"


TEMPLATE = "{% for m in messages %}{% if m.role != 'system' %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
REFUSES = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TEMPLATE, "does not show the system turn"),
        (REFUSES + "<|user|>{{ m.content }}{% endfor %}", "no system role"),
        ("{{ messages[-1].content }}", "does not show the user turn"),
    ],
)
def test_a_template_that_leaves_turns_out_is_refused(template, words, tmp_path, reader, input_template):
    rows = [{"m": "plain"}, {"m": CHAT[1:] if "-1" in template else CHAT}]
    prompts = prompts_of(tmp_path / "a.jsonl", *rows, column="m", max_prompt_length=60)
    own = reader.tokenizer.chat_template
    try:
        reader.tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=f"row 1 cannot be shown: .*{words}.*line 2.*data.turns: first_user"):
            fit(prompts, reader, 4)
    finally:
        reader.tokenizer.chat_template = own
    assert len(fit(prompts, reader, 4)) == 2


def test_a_system_message_is_put_first_unless_there_is_one(tmp_path):
    rows = {"m": "why"}, {"m": CHAT}
    chats = prompts_of(tmp_path / "a.jsonl", *rows, column="m", system="reason").take([0, 1]).chats
    assert chats == [[{"role": "system", "content": "reason"}, {"role": "user", "content": "why"}], CHAT]


# --------------------------------------------------------------------------------------------------- templates
def test_a_template_holds_columns_and_is_never_evaluated(tmp_path):
    row = {"q": "2+2", "n": [1, 2.5, True], "a.b": "{q} {{n}}", "__class__": "x"}
    template = "{{{q}}}: {n} {a.b}\nAnswer:"
    assert prompts_of(tmp_path / "a.jsonl", row, template=template).texts == [
        "{2+2}: [1, 2.5, true] {q} {{n}}\nAnswer:"
    ]


@pytest.mark.parametrize("template", ["{q.__class__}", "{q[0]}", "{q!r}", "{q:>9}", "{0}", "{question}"])
def test_a_template_with_an_unknown_column_is_one_line(template, tmp_path):
    with pytest.raises(ConfigError, match=r"has no column '.*' \(`data.template`\); it has q$"):
        prompts_of(tmp_path / "a.jsonl", {"q": "text"}, template=template)


@pytest.mark.parametrize("template", ["{", "a}", "{}", "{q}}", "{{{q}}", "no column", ""])
def test_a_template_that_is_none_is_refused_at_once(template):
    with pytest.raises(ConfigError, match=r"`data.template`"):
        DataConfig(template=template)


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_a_template_is_never_filled_with_nothing(value, tmp_path):
    with pytest.raises(ConfigError, match=r"row 1 has no prompt text: its column 'q'"):
        prompts_of(tmp_path / "a.jsonl", {"q": "x"}, {"q": value}, template="Q: {q}")


# ----------------------------------------------------------------------------------------- filters and bad rows
def test_rows_are_kept_by_their_columns(tmp_path):
    rows = [{"prompt": str(i), "l": i % 3, "t": ["a", None][i % 2]} for i in range(12)]
    kept = prompts_of(tmp_path / "a.jsonl", *rows, where={"l": [0, 1], "t": "a"})
    assert [row["prompt"] for row in kept.rows] == ["0", "4", "6", "10"] and kept.tally.elsewhere == 8
    assert len(prompts_of(tmp_path / "a.jsonl", *rows, where={"t": None})) == 6
    with pytest.raises(
        ConfigError, match=r"no prompt is left of 12 rows: 12 left out by data.where; 'l' is 0 or 1 or 2"
    ):
        prompts_of(tmp_path / "a.jsonl", *rows, where={"l": True})
    with pytest.raises(ConfigError, match=r"no column 'k' \(`data.where`\); it has l, prompt, t|prompt, l, t"):
        prompts_of(tmp_path / "a.jsonl", *rows, where={"k": 1})


def test_bad_rows_are_counted_up_to_a_fraction(tmp_path):
    path = tmp_path / "a.jsonl"
    deep = '{"prompt": "p", "x": ' + "[" * 200 + "]" * 200 + "}"
    bad = [b"{", b"3", b'{"prompt": 3}', b'{"x": 1}', b'{"prompt": "caf\xe9"}', b'{"prompt": "\\ud800"}', deep.encode()]
    path.write_bytes(b"\n\n".join([*(b'{"prompt": "good"}',) * 13, *bad]))
    prompts = load_prompts(str(path), DataConfig(max_bad=0.35))
    assert prompts.texts == ["good"] * 13 and (prompts.tally.rows, prompts.tally.bad) == (20, 7)
    assert prompts.tally.first_bad == f"{path}: row 13 is not JSON (line 27)"
    with pytest.raises(
        ConfigError, match=r"row 13 is not JSON \(line 27\); 7 of 20 rows are bad, and `data.max_bad` is"
    ):
        load_prompts(str(path), DataConfig(max_bad=0.34))


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_may_end_in_any_way(ends, mark, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + ends.join([b"one", b"", " \u2028".encode(), "two\u2028☃".encode(), b"three"]) + ends)
    prompts = load_prompts(str(path), DataConfig())
    assert prompts.texts == ["one", "two\u2028☃", "three"]
    assert prompts.data.told(2, "is") == "row 2 is (line 5)"


def test_duplicates_and_what_evaluation_uses_are_left_out(tmp_path):
    path = lines(tmp_path / "a.jsonl", *({"prompt": text, "i": i} for i, text in enumerate("abcbad")))
    held = lines(tmp_path / "b.jsonl", {"prompt": "d"}, {"prompt": "d"})
    training, evaluation = load_data(DataConfig(path=path, eval_path=held, deduplicate=True))
    assert [row["i"] for row in training.rows] == [0, 1, 2] and len(evaluation) == 1
    assert (training.tally.duplicates, training.tally.evaluated, evaluation.tally.duplicates) == (2, 1, 1)
    assert load_data(DataConfig(path=path, eval_path=held))[0].texts == list("abcbad")


def test_held_out_prompts_depend_on_their_text_alone(tmp_path):
    texts = [f"prompt {i % 150}" for i in range(200)]
    config = DataConfig(path=lines(tmp_path / "a.jsonl", *({"prompt": t} for t in texts)), eval_fraction=0.2)
    training, evaluation = load_data(config)
    held = set(evaluation.texts)
    assert 15 < len(held) < 45 and not held & set(training.texts)
    assert sorted(training.texts + evaluation.texts) == sorted(texts) and training.tally.held_out == len(evaluation)
    other = DataConfig(path=lines(tmp_path / "b.jsonl", *({"prompt": t} for t in texts[40:0:-1])), eval_fraction=0.2)
    assert set(load_data(other)[1].texts) == held & set(texts[1:41])
    assert load_data(config, evaluates=False)[0].texts == training.texts, "never trained on, evaluated or not"


def test_only_the_first_rows_are_read(tmp_path):
    rows = [{"prompt": str(i)} for i in range(9)]
    path = lines(tmp_path / "a.jsonl", *rows, "no row")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name in (path, str(tmp_path / "a.parquet")):
        assert load_prompts(name, DataConfig(max_rows=4)).texts == ["0", "1", "2", "3"]


# ------------------------------------------------------------------------------------------------------ lengths
def long_rows() -> list[dict]:
    words = "the plot of this film is " * 40
    return [
        {"m": "short"},
        {"m": f"{words}at its end"},
        {"m": [*CHAT[:3], {"role": "user", "content": "why?" + words}]},
    ]


@pytest.mark.parametrize("limit", [24, 40])
def test_what_is_too_long_is_refused_dropped_or_cut(limit, tmp_path, reader):
    prompts = prompts_of(tmp_path / "a.jsonl", *long_rows(), column="m", max_prompt_length=limit)
    with pytest.raises(ConfigError, match=r"row 1 has a prompt of \d+ tokens.*line 2.*2 of 3 .*`data.too_long: drop`"):
        fit(prompts, reader, 4)
    dropped = fit(replace(prompts, config=replace(prompts.config, too_long="drop")), reader, 4)
    assert dropped.texts == ["short"] and dropped.tally.dropped == 2
    cut = fit(replace(prompts, config=replace(prompts.config, too_long="truncate")), reader, 4)
    assert len(cut) == 3 and cut.tally.truncated == 2
    batch = cut.take([0, 1, 2])
    assert batch.chats[0] == "short" and batch.rows[1] == long_rows()[1], "rows stay as they are"
    text, chat = batch.chats[1:]
    assert long_rows()[1]["m"].endswith(text) and text.endswith("at its end")
    assert [turn["role"] for turn in chat] == ["system", "user"], "the oldest turns go, and not the system's"
    for prompt, shown, count in zip(batch.chats, batch.inputs, reader.lengths(batch.inputs), strict=True):
        assert count <= limit and shown == reader.format_prompt(prompt), "no marker of the template is cut"
    for prompt, whole in ((text, long_rows()[1]["m"]), (chat, long_rows()[2]["m"][-1]["content"])):
        one_more = whole[-len(turns_of(prompt)[-1]["content"]) - 1 :]
        longer = [*chat[:-1], {"role": "user", "content": one_more}] if isinstance(prompt, list) else one_more
        assert reader.lengths([reader.format_prompt(longer)])[0] > limit, "and no more than has to be"
    assert fingerprint(cut)["prompts"] != fingerprint(prompts)["prompts"]


def test_no_text_is_on_both_sides_once_prompts_are_cut(tmp_path, reader):
    """Prompts that differ only in what is cut off: the hash of the whole text does not keep them apart."""
    ending = "and now a word on the plot of this film and on its end"
    rows = [{"prompt": f"number {i} " + "of many words " * 40 + ending} for i in range(40)]
    rows += [{"prompt": f"short {i}"} for i in range(20)]
    settings = {"eval_fraction": 0.5, "too_long": "truncate", "max_prompt_length": 30}
    config = DataConfig(path=lines(tmp_path / "a.jsonl", *rows), **settings)
    training, evaluation = fit_both(*load_data(config), reader, 4)
    assert (
        len(training.cuts) > 9
        and evaluation.tally.trained > 9
        and set(evaluation.texts) < {f"short {i}" for i in range(20)}
    )
    assert not set(training.texts) & set(evaluation.texts)
    alone, _ = fit_both(load_data(config)[0], None, reader, 4)
    assert alone.texts == training.texts, "what is trained on does not depend on evaluation"
    with pytest.raises(ConfigError, match="every evaluation prompt is trained on too"):
        fit_both(*load_data(replace(config, max_rows=40)), reader, 4)
    whole, others = load_data(replace(config, too_long="drop"))
    assert fit_both(whole, others, reader, 4)[1].tally.trained == 0


def test_a_prompt_that_cannot_be_cut_is_left_out(tmp_path, reader):
    assert shorten([{"role": "system", "content": "long " * 90}, {"role": "user", "content": "x"}], reader, 30) is None
    rows = {"prompt": "fine"}, {"prompt": "text " * 90 + "\n" * 60}
    cut = prompts_of(tmp_path / "a.jsonl", *rows, too_long="truncate", max_prompt_length=20)
    fitting = fit(cut, reader, 4)
    assert all(text.strip() for text in fitting.texts)
    assert fitting.tally.truncated + fitting.tally.dropped == 1


def test_short_prompts_are_left_out(tmp_path, reader):
    rows = [{"prompt": "a b c d"[: 2 * n - 1]} for n in (1, 2, 3, 4)]
    kept = fit(prompts_of(tmp_path / "a.jsonl", *rows, min_prompt_length=3), reader, 4)
    counts = reader.text_lengths([row["prompt"] for row in rows])
    assert kept.texts == [row["prompt"] for row, n in zip(rows, counts, strict=True) if n >= 3]
    assert kept.tally.short == sum(n < 3 for n in counts) > 0


def test_lengths_that_are_beyond_doubt_are_not_counted_and_nothing_changes(tmp_path, reader, monkeypatch):
    texts = ["a", "ab " * 9, "x" * 11, "☃☃☃☃", "<|mask|>" * 3, "long words " * 30, "\t!", "1234567890" * 2]
    rows = [{"prompt": text} for text in texts * 3] + [{"prompt": "fine"}]
    settings = {"too_long": "drop", "max_prompt_length": 55}
    prompts = prompts_of(tmp_path / "a.jsonl", *rows, **settings)
    every = fit(prompts, reader, 4)
    sure = bound_of(reader.tokenizer)
    assert sure is not None
    for text in texts:
        if sure(reader, text, 55):
            assert reader.lengths([reader.format_prompt(text)])[0] <= 55 and reader.text_lengths([text])[0]
    assert {sure(reader, text, 55) for text in texts} == {True, False}
    monkeypatch.setattr("rgrl.data.lengths.MANY", 1)
    fast = fit(prompts, reader, 4)
    assert fast.texts == every.texts and fast.tally == every.tally and 0 < every.tally.dropped


# --------------------------------------------------------------------------------------- where rows come from
@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set of two configurations, as the Hub has them."""
    path = tmp_path / "gsm"
    path.mkdir()
    (path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: main\n  data_files:\n  - split: train\n    path: a.jsonl\n  - split: test\n    path: b.jsonl\n"
        "- config_name: socratic\n  data_files:\n  - split: train\n    path: c.jsonl\n---\n"
    )
    for name in "abc":
        lines(path / f"{name}.jsonl", *({"prompt": f"{name}{i}", "answer": "#### 4"} for i in range(3)))
    return path


def test_a_data_set_of_several_configurations(folder):
    with pytest.raises(ConfigError, match=r"several configurations: name one of main, socratic as `data.subset`"):
        load_prompts(str(folder), DataConfig())
    with pytest.raises(ConfigError, match=r"no configuration 'x' \(`data.subset`\); it has main, socratic"):
        load_prompts(str(folder), DataConfig(subset="x"))
    with pytest.raises(ConfigError, match=r"no split 'trian' \(`data.split`\); it has train, test"):
        load_prompts(str(folder), DataConfig(subset="main", split="trian"))
    with pytest.raises(ConfigError, match=r"only a data set of the Hub has a revision \(v1\)"):
        load_prompts(str(folder), DataConfig(path=str(folder), subset="main", revision="v1"))
    config = DataConfig(path=str(folder), subset="main", eval_split="test")
    training, evaluation = load_data(config)
    assert (training.texts, evaluation.texts) == (["a0", "a1", "a2"], ["b0", "b1", "b2"])
    other = DataConfig(path=str(folder), subset="main", eval_path=str(folder), eval_subset="socratic")
    assert load_data(other)[1].texts == ["c0", "c1", "c2"]
    with pytest.raises(ConfigError, match=r"no split 'valid' \(`data.eval_split`\)"):
        load_data(replace(config, eval_split="valid"))


def test_the_real_cause_is_told(tmp_path):
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit")
    with pytest.raises(ConfigError, match="scripts are no longer supported"):
        load_prompts(str(tmp_path / "script"), DataConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="doesn't contain any data files"):
        load_prompts(str(tmp_path / "empty"), DataConfig())


@pytest.mark.parametrize("settings", [{"subset": "main"}, {"revision": "v1", "path": "a.jsonl"}])
def test_a_file_has_no_subset_and_no_revision(settings, tmp_path):
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_text("prompt\na\n")
        with pytest.raises(ConfigError, match=r"is a file, .*null"):
            load_prompts(str(tmp_path / name), DataConfig(**settings))


def test_what_has_no_splits_is_never_evaluated_on_its_training_rows(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"})
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(saved)
    for path, words in ((file, "is a file, which has no splits"), (str(saved), "is a folder of a single split")):
        with pytest.raises(ConfigError, match=rf"{words} \(`data.eval_split` is 'test'\).*`data.eval_fraction`"):
            load_data(DataConfig(path=path, eval_split="test"))
        with pytest.raises(ConfigError, match=rf"{words} \(`data.split` is 'test'\)"):
            load_data(DataConfig(path=path, split="test"))
        assert load_data(DataConfig(path=path, eval_path=path))[1] is not None, "that is what the settings say"


def test_a_saved_data_set_is_read_whole_whatever_it_is_formatted_as(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": i, "messages": [{"role": "user", "content": f"m{i}"}]} for i in range(3)]
    for kind in ("torch", "numpy", "pandas", "arrow"):
        datasets.Dataset.from_list(rows).with_format(kind, columns=["prompt"]).save_to_disk(tmp_path / kind)
        assert load_prompts(str(tmp_path / kind), DataConfig()).rows == rows
        assert load_prompts(str(tmp_path / kind), DataConfig(column="messages")).texts == ["m0", "m1", "m2"]


def test_a_csv_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\n\nprompt,answer\nNA,null\n"one, two",\nNone,nan\n')
    assert load_prompts(str(path), DataConfig()).rows == [
        {"prompt": "NA", "answer": "null"},
        {"prompt": "one, two", "answer": None},
        {"prompt": "None", "answer": "nan"},
    ]
    for text, line in (("one, two,3\nthree, four,5\n", 2), ("one,3\n\nthree, four,5\n", 4)):
        path.write_text(f"prompt,answer\n{text}")
        with pytest.raises(ConfigError, match=f"line {line} has 3 fields, and the header 2"):
            load_prompts(str(path), DataConfig())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "a", "generate": "sudoku4"}, "both set"),
        ({"eval_subset": "x"}, "`data.eval_path`, which is not set"),
        ({"path": "a", "eval_fraction": 0.1, "eval_path": "b"}, "`data.eval_fraction` and `data.eval_path`"),
        ({"path": "a", "eval_fraction": 0.1, "eval_split": "b"}, "`data.eval_fraction` and `data.eval_split`"),
        ({"generate": "sudoku4", "eval_split": "b"}, "have no splits"),
        ({"where": {"a": {"b": 1}}}, "`data.where.a`"),
        ({"where": {"a": []}}, "`data.where.a`"),
        ({"revision": "v1"}, "pins `data.path`"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        DataConfig(**settings)


# ------------------------------------------------------------------------------------------------ read by number
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_are_read_by_number_whatever_their_types(suffix, tmp_path):
    rows = [
        {"prompt": f"p{i}", "n": None if i == 2 else i, "l": [i, i + 1], "s": {"a": i, "b": [{"c": "x" * i}]}}
        for i in range(7)
    ]
    path = tmp_path / f"a.{suffix}"
    lines(path, *rows) if suffix == "jsonl" else datasets.Dataset.from_list(rows).to_parquet(path)
    prompts = load_prompts(str(path), DataConfig())
    assert prompts.rows == rows and prompts.take([5, 2, 2]).rows == [rows[5], rows[2], rows[2]]
    assert prompts.columns == ["l", "n", "prompt", "s"]
    assert fingerprint(prompts) == fingerprint(Prompts([row["prompt"] for row in rows], rows))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("listed", [True, False])
def test_json_is_read_value_by_value_and_nothing_in_it_is_guessed(listed, indent, tmp_path):
    rows = [
        {"prompt": "2024-01-05", "answer": 2**53 + 1},
        {"prompt": 'é"}] 😀', "answer": 1.5, "more": [{"a": 1}, {"b": None}]},
        {"prompt": "last", "answer": 10**30},
    ]
    path, bad = tmp_path / "a.json", {"prompt": "x", "answer": "\ud800"}
    texts = [json.dumps(row, ensure_ascii=row is bad, indent=indent) for row in (*rows[:2], bad, 7, *rows[2:])]
    path.write_text(f"\ufeff[\n{','.join(texts)}\n]\n" if listed else "\n".join(texts), encoding="utf-8")
    prompts = load_prompts(str(path), DataConfig(max_bad=0.5))
    assert prompts.rows == rows and prompts.tally.bad == 2
    assert "row 2 holds half a surrogate pair" in prompts.tally.first_bad
    assert load_prompts(str(path), DataConfig(max_rows=2)).rows == rows[:2]


def test_a_list_of_json_that_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "a.json"
    for text, words in (
        ('[{"prompt": "a"},\n', "no end of the list, after line 1"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "no comma"),
        ('[{"prompt": "a"}] [{"prompt": "b"}]', "something follows its list"),
        ('[\n{"prompt": "a"}, {"prompt"', "line 2"),
        ('[{"prompt": ' + "[" * 10**5, "nested too deeply"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"cannot be read as json: .*{words}"):
            load_prompts(str(path), DataConfig())


@pytest.mark.parametrize("small", [True, False])
def test_a_file_that_is_changed_in_a_run_is_never_misread(small, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "IN_MEMORY", 1 << 26 if small else 0)
    path = tmp_path / "a.jsonl"
    prompts = prompts_of(path, *({"prompt": f"prompt {i}"} for i in range(50)))
    with path.open("r+") as file:
        file.write('{"prompt": "PROMPT 0"}')
        file.truncate(400)
    for i in (0, 49):
        if small:
            assert prompts.take([i]).texts == [f"prompt {i}"]
        else:
            with pytest.raises(
                ConfigError, match=rf"changed while it was in use: row {i} is another now \(line {i + 1}"
            ):
                prompts.take([i])
    assert prompts.take([1]).texts == ["prompt 1"]


# ------------------------------------------------------------------------------------------------------ rgrl data
def test_data_are_shown_as_the_models_see_them(tiny, tmp_path, capsys):
    path = lines(
        tmp_path / "chat.jsonl",
        {"m": ANSWERED, "l": "en"},
        {"m": "a\x1b[2J b " * 40, "l": "en"},
        {"m": "nein", "l": "de"},
    )
    data = {"path": path, "eval_path": None, "column": "m", "where": {"l": "en"}, "too_long": "truncate"}
    config = write(changed(tiny, data=data | {"max_prompt_length": 30}), tmp_path)
    main(["data", "--config", str(config), "--first", "2"])
    text = capsys.readouterr().out
    assert "3 rows, 2 prompts; 1 left out by data.where, 1 longer than data.max_prompt_length and cut" in text
    assert "training prompt 1 of 2, row 0 (line 1)" in text and "prompt 2 of 2, row 1 (line 2); cut: 0 of its" in text
    assert "be brief" in text and text.count("and the plot") == 3, "policy, reward model and judge"
    assert text.count("[completion]") == 4 and "\x1b" not in text and "\\x1b[2J" in text
    assert not list(tmp_path.glob("run*")), "nothing is written"


def test_data_shows_the_coverage_of_another_vocabulary(capsys):
    main(["data", "--config", str(REPO / "recipes" / "reviews" / "llada.yaml"), "--first", "0"])
    text = capsys.readouterr().out
    assert "3694 exact (73.9 %), 1301 composed (26.0 %), 0 unmatched (0.0 %), 5 special" in text and "---" not in text


# ------------------------------------------------------------------------------------------------- in whole runs
def test_a_run_on_chats_is_judged_again_as_it_was(tiny, tmp_path, judge_dir):
    """Its tables hold what the judge was shown, so that `rgrl judge` gives the same scores."""
    short = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}, CHAT[1]]
    path = lines(tmp_path / "a.jsonl", *({"m": m} for m in ("the plot", short, CHAT[1:2], [CHAT[0], CHAT[1]])))
    data = {"path": path, "eval_path": path, "column": "m", "max_prompt_length": 50}
    out = go(changed(tiny, data=data, rollout={"num_generations": 2}), tmp_path, steps=1)
    tables = rejudge.read_tables(out)
    judge = load_classifier(judge_dir, name="judge")
    judge.template.make_room(rejudge.completion_length(out))
    for table in rejudge.rejudge(tables, judge, 3, lambda text: None):
        assert [type(chat) for chat in table.chats] == [str, list, str, list]
        assert table.scores["new"] == pytest.approx(table.scores["judge"], abs=1e-4)
    again = go(changed(tiny, data=data), tmp_path, steps=2, resume_from_checkpoint="latest")
    assert again == out
    with pytest.raises(ConfigError, match=r"`data.path` held 4 prompts"):
        go(changed(tiny, data=data | {"turns": "first_user"}), tmp_path, steps=3, resume_from_checkpoint="latest")


@pytest.mark.parametrize("kind", ["countdown", "sudoku4"])
def test_generated_puzzles_are_never_trained_on_and_evaluated_too(kind):
    pytest.importorskip("rgrl.data.puzzles")
    config = DataConfig(generate=kind, generate_rows=120, eval_fraction=0.25)
    training, evaluation = load_data(config)

    def puzzles(prompts):
        return {
            (row["puzzle"],) if kind == "sudoku4" else (row["target"], *sorted(row["numbers"])) for row in prompts.rows
        }

    assert len(puzzles(training)) + len(puzzles(evaluation)) == 120 and not puzzles(training) & puzzles(evaluation)
    more = load_data(replace(config, generate_rows=200))[1]
    assert set(evaluation.texts) <= set(more.texts), "more puzzles leave the others on their side"
    assert fingerprint(load_data(config)[0]) == fingerprint(training)
