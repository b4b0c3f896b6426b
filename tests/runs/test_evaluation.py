"""Evaluation: what its numbers are, and what a completion of a prompt does not depend on."""

import json
import os
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import PROMPTS
from processes import ENV, TRAIN, finish, start
from training import changed, go, resolved, tables, untimed, write

from rgrl.errors import ConfigError
from rgrl.evaluation.alarm import History, basis, look, measure
from rgrl.evaluation.guards import distinct
from rgrl.evaluation.intervals import by_prompt, intervals, mean_and_half
from rgrl.evaluation.passes import pass_at
from rgrl.evaluation.rejudge import Table, as_text, summary
from rgrl.tracking import report
from rgrl.trainer import evaluate, sample

MODULE = '''
def even(prompts, completions, rows):
    """1 for texts of an even length; None where the row has no answer."""
    return [None if row["answer"] is None else float(len(c) % 2 == 0) for c, row in zip(completions, rows)]


def shorter(prompts, completions, rows):
    return [-float(len(c)) / 100 for c in completions]


def broken(prompts, completions, rows):
    if rows[0]["answer"] is not None and len(completions) > 2:
        raise ValueError("no")
    return [1.0] * len(completions)
'''


@pytest.fixture(scope="module", autouse=True)
def my_verifiers(tmp_path_factory) -> Iterator[Path]:
    """The folder with the module, which can be imported."""
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "my_verifiers.py").write_text(MODULE)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def task(tiny, tmp_path) -> dict:
    """The settings of a run with two verifiers beside the reward model, on data with columns."""
    answers = [None, "7", "8", "9", "10", "11"]
    rows = [
        {"prompt": p, "answer": a, "reward": "mine", "units": [{"unit": "m"}]}
        for p, a in zip(PROMPTS, answers, strict=True)
    ]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return changed(
        tiny,
        data={"path": str(tmp_path / "task.jsonl"), "eval_path": str(tmp_path / "task.jsonl"), "eval_prompts": 6},
        reward={"functions": {"my_verifiers:even": 2.0, "my_verifiers:shorter": 1.0}},
        guidance={"share": 0.5},
    )


def test_metrics_do_not_depend_on_the_batch_size(tiny, tmp_path):
    prompts = tmp_path / "twelve.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS * 2))
    tiny["data"] |= {"eval_path": str(prompts), "eval_prompts": 12}
    batches = [{"prompts_per_device": n} for n in (2, 6)]  # batches of 8 and 4 rows, and one of 12
    one, other = (evaluate(resolved(changed(tiny, run=run), tmp_path)).metrics for run in batches)
    assert one == pytest.approx(other, abs=1e-4)
    assert {"eval/reward", "eval/judge", "eval/base_nll"} <= one.keys()


def test_the_first_completions_are_the_same_however_many_there_are(task, tmp_path):
    """Whatever the batches."""
    found = {}
    for samples, micro_batch in ((1, 0), (3, 0), (4, 5)):
        now = changed(task, eval={"samples": samples}, rollout={"micro_batch": micro_batch})
        rows = evaluate(resolved(now, tmp_path)).rows
        assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(6) for s in range(samples)]
        found[samples] = {(row["index"], row["sample"]): row for row in rows}
    texts = {n: {at: row["completion"] for at, row in rows.items()} for n, rows in found.items()}
    assert texts[1].items() <= texts[3].items() <= texts[4].items()
    assert all(len({texts[4][i, s] for s in range(4)}) > 1 for i in range(6)), "and they differ"
    for at, row in found[1].items():
        assert row["reward"] == pytest.approx(found[4][at]["reward"], abs=1e-4)


def test_the_numbers_of_a_task_by_hand(task, tmp_path):
    config = resolved(changed(task, eval={"samples": 3, "passes": {"model": 0.0}}), tmp_path)
    found = evaluate(config)
    rows, metrics = found.rows, found.metrics
    for row in rows:
        assert row["rewards/even"] == (None if row["index"] == 0 else float(len(row["completion"]) % 2 == 0))
        total = row["rewards/model"] + 2 * (row["rewards/even"] or 0.0) + row["rewards/shorter"]
        assert row["reward"] == pytest.approx(total, abs=1e-5) and row["guided"] is False
        assert row["data/reward"] == "mine"
        assert row["answer"] == (None if row["index"] == 0 else str(6 + row["index"]))
        assert row["units"] == '[{"unit": "m"}]'
    for name in ("model", "even", "shorter"):
        rated = [row[f"rewards/{name}"] for row in rows if row[f"rewards/{name}"] is not None]
        assert metrics[f"eval/rewards/{name}/mean"] == pytest.approx(statistics.mean(rated))
    assert metrics["eval/rewards/even/none"] == 3 and metrics["eval/rewards/shorter/none"] == 0
    assert "eval/rewards/model/none" not in metrics, "a model rates everything"
    passed = [sum(row["rewards/even"] for row in rows[i : i + 3]) for i in range(3, 18, 3)]
    for k in (1, 2, 3):
        expected = statistics.mean(pass_at(k, int(c), 3) for c in passed)
        assert metrics[f"eval/rewards/even/pass_at_{k}"] == pytest.approx(expected)
    best = [any(row["rewards/model"] >= 0 for row in rows[i : i + 3]) for i in range(0, 18, 3)]
    assert metrics["eval/rewards/model/pass_at_3"] == pytest.approx(sum(best) / 6)
    assert not [name for name in metrics if name.startswith("eval/rewards/shorter/pass")], "it is negative"
    texts = [row["completion"] for row in rows]
    assert metrics["eval/distinct_2"] == pytest.approx(distinct(texts, 2))
    assert metrics["eval/length"] == pytest.approx(statistics.mean(row["length"] for row in rows))


def test_every_row_says_whether_it_was_guided_and_has_parts_and_columns(task, tmp_path, capfd):
    output = go(changed(task, eval={"samples": 2}), tmp_path, steps=1)
    for name, rows in tables(output).items():
        guided = {"eval": [False] * 12, "train": [True, False] * 2}[name.partition("_")[0]]
        assert [row["guided"] for row in rows] == guided
        assert {"rewards/model", "rewards/even", "rewards/shorter", "answer", "data/reward"} <= rows[0].keys()
    first = [row["reward"] for row in tables(output)["eval_000000.parquet"] if row["sample"] == 0]
    assert untimed(output)[0]["guidance/reward_before"] == pytest.approx(statistics.mean(first))
    rows = list(sample(resolved(task, tmp_path)))
    assert len(rows) == 12 and all(json.loads(json.dumps(row, allow_nan=False)) == row for row in rows)
    assert [sum(row["guided"] for row in rows if row["index"] == i) for i in range(6)] == [1] * 6
    unguided = list(sample(resolved(changed(task, guidance={"kind": "none"}), tmp_path)))
    assert not any(row["guided"] for row in unguided) and {"rewards/even", "answer"} <= unguided[0].keys()


def test_the_temperature_is_that_of_evaluations_alone(task, tmp_path):
    """Training does not see it, `rgrl sample` does."""
    greedy = changed(task, eval={"temperature": 0})
    outputs = [go(config, tmp_path, output_dir=name, eval_steps=2) for name, config in (("a", task), ("b", greedy))]
    trained, other = ({k: v for k, v in tables(output).items() if k.startswith("train")} for output in outputs)
    assert trained == other
    first, second = (tables(output)["eval_000000.parquet"] for output in outputs)
    assert [row["completion"] for row in first] != [row["completion"] for row in second]
    seeds = [evaluate(resolved(changed(greedy, run={"seed": seed}), tmp_path)).rows for seed in (0, 1)]
    assert [row["completion"] for row in seeds[0]] == [row["completion"] for row in second]
    assert [row["completion"] for row in seeds[0]] == [row["completion"] for row in seeds[1]]
    drawn = {row["completion"]: row for row in sample(resolved(greedy, tmp_path))}
    assert {row["completion"] for row in second} <= {text for text, row in drawn.items() if not row["guided"]}
    same = evaluate(resolved(changed(task, eval={"temperature": 0.9}), tmp_path)).rows
    assert [row["completion"] for row in same] == [row["completion"] for row in first]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"rollout": {"temperature": 0}}, "`rollout.temperature` must be above 0, not 0"),
        ({"eval": {"temperature": -0.5}}, "`eval.temperature` must be at least 0"),
        ({"eval": {"temperature": 0, "samples": 2}}, "`eval.samples` (2) must be 1 with `eval.temperature: 0`"),
        ({"eval": {"samples": 0}}, "`eval.samples` must be at least 1"),
        (
            {"eval": {"passes": {"evn": 1.0}}},
            "`eval.passes.evn`: no reward of this run has this name; known: model, ev",
        ),
    ],
)
def test_settings_that_cannot_be_evaluated_are_named(sections, told, task, tmp_path):
    with pytest.raises(ConfigError) as error:
        evaluate(resolved(changed(task, **sections), tmp_path))
    assert told in str(error.value)


def test_a_greedy_order_that_is_drawn_allows_several_samples(task, tmp_path):
    greedy = changed(task, eval={"temperature": 0, "samples": 2}, rollout={"confidence": "origin"})
    rows = evaluate(resolved(greedy, tmp_path)).rows
    assert any(a["completion"] != b["completion"] for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_a_verifier_that_fails_in_an_evaluation_is_told(task, tmp_path, capfd):
    """Its 0 would otherwise look like a wrong answer."""
    task["reward"] |= {"functions": {"my_verifiers:broken": 1.0}, "on_error": "zero"}
    (tmp_path / "task.jsonl").write_text('{"prompt": "x", "answer": 1}\n' * 6)
    evaluate(resolved(task, tmp_path))
    assert "reward 'broken' raised ValueError: no" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------- what reads evaluations
def rows_of(values: list[list[float | None]], texts: list[list[str]]) -> list[dict]:
    return [
        {"index": i, "sample": s, "prompt": f"p{i}", "completion": text, "reward": r, "judge": r}
        for i, (some, written) in enumerate(zip(values, texts, strict=True))
        for s, (r, text) in enumerate(zip(some, written, strict=True))
    ]


def test_noise_is_that_of_prompts_however_often_each_is_completed():
    """Copies of a completion tell nothing new: neither the alarm nor an interval may grow surer of it."""
    values = [[[1.0], [2.0], [4.0], [3.5]], [[2.0], [2.5], [4.0], [6.0]]]
    texts = [[["a b c"], ["a c d"], ["e f"], ["a b"]], [["a b c"], ["b c d"], ["e f"], ["z b"]]]
    found = {}
    for n in (1, 5):
        rows = [
            rows_of([v * n for v in some], [t * n for t in written])
            for some, written in zip(values, texts, strict=True)
        ]
        history = look(History("x"), measure(0, rows[0])).history
        found[n] = look(history, measure(1, rows[1])).metrics, intervals(rows[1])
    assert found[5][0] | {"hacking/distinct_2": 0} == pytest.approx(found[1][0] | {"hacking/distinct_2": 0})
    assert found[5][1] == found[1][1] and "over 4 prompts: eval/reward ± 2.86" in found[1][1]
    assert by_prompt([0, 1, 0, 1, 2], [1.0, None, 3.0, 5.0, None]) == [2.0, 5.0, None]


def test_the_jackknife_leaves_out_prompts():
    rows = rows_of([[0.0] * 2] * 3, [["a b", "c d"], ["a b", "a b c"], ["x y z", ""]])
    texts = [row["completion"] for row in rows]
    parts = measure(0, rows).parts["distinct_2"]
    for i, value in enumerate(parts):
        others = [row["completion"] for row in rows if row["index"] != i]
        assert value == pytest.approx(3 * distinct(texts, 2) - 2 * distinct(others, 2))


def test_evaluations_of_more_samples_do_not_compare_and_settings_of_before_do(tiny, tmp_path):
    def now(**sections) -> str:
        return basis(resolved(changed(tiny, **sections), tmp_path), {})

    assert now() == now(eval={"temperature": 0.9}) == now(eval={"passes": {"x": 1.0}})
    assert now(rollout={"temperature": 0.5}) == now(eval={"temperature": 0.5})
    assert len({now(), now(eval={"samples": 2}), now(eval={"temperature": 0}), now(eval={"temperature": 0.5})}) == 4


def test_a_resumed_run_says_that_its_evaluations_are_others(task, tmp_path, capfd):
    go(task, tmp_path, steps=1)
    again = changed(task, eval={"samples": 2, "temperature": 0.5})
    capfd.readouterr()
    output = go(again, tmp_path, resume_from_checkpoint="latest")
    told = capfd.readouterr().err
    assert "`eval.temperature` and `eval.samples`; expect a kink in the curves" in told
    assert "the hacking alarm compares from here on only" in told
    assert {len(tables(output)[f"eval_{step:06d}.parquet"]) for step in (0, 2)} == {6, 12}
    assert "[the plot" in report.before_and_after(output) and "eval/rewards/even/mean" in report.summary(output)


def test_the_report_shows_first_completions_and_knows_the_word_of_all(task, tmp_path):
    output = go(changed(task, eval={"samples": 3}), tmp_path, steps=1)
    rows = tables(output)["eval_000000.parquet"]
    word = next((row["top_word"] for row in rows if row["top_word"] is not None), None)
    assert report.counted_word(output, 0) == word is not None
    shown = re.sub(r"\s+", " ", report.before_and_after(output))
    assert all(" ".join(row["completion"].split()) in shown for row in rows if row["sample"] == 0 and row["index"] < 4)
    summary_of = report.summary(output)
    assert "eval/rewards/even/pass_at_3" in summary_of and "eval/rewards/shorter/mean" in summary_of


def test_a_judge_counts_prompts_and_tells_parts():
    scores = {"reward": [1.0, 3.0, None, 5.0], "rewards/a": [1.0, None, 0.0, 1.0], "rewards/a_half": [9.0] * 4}
    scores |= {"new": [0.0, 2.0, 4.0, 6.0]}
    before = Table(0, [0, 0, 1, 1], ["p", "p", "q", "q"], list("abcd"), scores)
    after = Table(1, [0, 0, 2], ["p", "p", "r"], list("abc"), {"new": [3.0, 5.0, 7.0]})
    first, second = summary([before, after])
    assert first["n"] == 4 and (first["new"], first["new_half"]) == mean_and_half([1.0, 5.0])
    assert (first["reward"], first["reward_half"]) == mean_and_half([2.0, 5.0])
    assert (first["rewards/a"], first["half of rewards/a"]) == mean_and_half([1.0, 0.5])
    assert first["rewards/a_half"] == 9.0 and second["rewards/a"] is None and second["change"] == 3.0
    assert second["change_half"] is None and re.search(r" a +a_half +judge +this judge", as_text([first, second]))


# --------------------------------------------------------------------------------------------------------- processes
@pytest.mark.slow
def test_processes_share_an_evaluation_without_changing_it(task, tmp_path, my_verifiers):
    task = changed(task, eval={"samples": 3}, run={"steps": 1, "save_steps": 0})
    alone = go(task, tmp_path)
    config = write(changed(task, run={"output_dir": str(tmp_path / "two"), "prompts_per_device": 1}), tmp_path)
    path = os.pathsep.join([str(my_verifiers), ENV["PYTHONPATH"]])
    finish(start(TRAIN, "--config", config, processes=2, PYTHONPATH=path))
    one, two = (tables(output)["eval_000000.parquet"] for output in (alone, tmp_path / "two"))
    assert len(one) == 18 and [list(row) for row in one] == [list(row) for row in two]
    for a, b in zip(one, two, strict=True):
        assert a == {key: pytest.approx(value, abs=1e-4) if type(value) is float else value for key, value in b.items()}
    lines = [untimed(output)[0] for output in (alone, tmp_path / "two")]
    assert lines[0] == pytest.approx(lines[1], abs=1e-4)
