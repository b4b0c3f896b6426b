"""A run that collapses: the hacking alarm rings, can stop it, and remembers what it compares with when it resumes."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from checkpoints import PROMPTS
from training import assert_same_run, changed, go, resolved, saved, tables, untimed

from rgrl.errors import RunStoppedError
from rgrl.evaluation.alarm import History, basis, look, measure
from rgrl.evaluation.guards import distinct, empty, top_word
from rgrl.tracking import report


def few_letters(prompts, completions, rows):
    """The fewer different letters the better."""
    return [-float(len(set(text))) for text in completions]


def collapsing(tiny: dict, folder: Path) -> dict:
    """Imitation at a high rate, which ends in loops, under a reward that likes them."""
    (folder / "eval.txt").write_text("\n".join(f"{prompt} {word}" for prompt in PROMPTS for word in ("is", "was")))
    return changed(
        tiny,
        data={"eval_path": str(folder / "eval.txt"), "eval_prompts": 12},
        reward={"path": None, "functions": {"test_hacking:few_letters": 1.0}},
        guidance={"kind": "none"},
        objective={"name": "likelihood", "beta": 0.0},
        optim={"learning_rate": 0.1},
        rollout={"num_generations": 4, "temperature": 0.3},
        run={"steps": 9, "eval_steps": 3, "save_steps": 3, "prompts_per_device": 4},
    )


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory, tiny_in) -> tuple[dict, Path]:
    """The settings and the output folder of a run that warned, and went on."""
    folder = tmp_path_factory.mktemp("collapsed")
    settings = collapsing(tiny_in(folder), folder)
    return settings, go(settings, folder)


def rang(output: Path) -> list[int]:
    return [line["step"] for line in untimed(output) if line.get("hacking/alarm")]


def test_guards_and_looks_are_those_of_the_tables(collapsed):
    _, output = collapsed
    history = History()
    lines = {line["step"]: line for line in untimed(output) if "eval/reward" in line}
    assert list(lines) == [0, 3, 6, 9] and rang(output)[-1] == 9
    for step, line in lines.items():
        rows = tables(output)[f"eval_{step:06d}.parquet"]
        texts = [row["completion"] for row in rows]
        word, held = top_word([row["prompt"] for row in rows], texts)
        assert [row["top_word"] for row in rows] == [word if holds else None for holds in held]
        found = look(history, measure(step, rows))
        history = found.history
        measured = {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2), "empty": empty(texts)}
        measured |= {"top_word": sum(held) / 12}
        expected = {f"eval/{name}": value for name, value in measured.items()} | found.metrics
        assert {name: line[name] for name in expected} == pytest.approx(expected)
        assert found.metrics.keys() == {name for name in line if name.startswith("hacking/")}


def test_a_run_that_is_stopped_and_goes_on_is_the_same_run(collapsed, tmp_path, capfd):
    settings, whole = collapsed
    first = rang(whole)[0]
    assert first < 9, "there is something left to stop"
    with pytest.raises(RunStoppedError, match=f"stopped at step {first}, which looks like reward hacking") as stopped:
        go(settings, tmp_path, on_hacking="stop")
    assert stopped.value.code == 1 and "eval/distinct_2 fell by" in str(stopped.value)
    output = tmp_path / "run"
    assert rang(output) == [first] and saved(output)[-1] == f"step_{first:06d}"
    assert capfd.readouterr().err.count("looks like reward hacking") == 1
    progress = json.loads((output / "checkpoints" / f"step_{first:06d}" / "progress.json").read_text())
    assert progress["evaluations"]["count"] == 1 + first // 3
    go(settings, tmp_path, on_hacking="warn", resume_from_checkpoint="latest")
    assert_same_run(output, whole, 9)
    final = [run / "checkpoints" / "step_000009" / "progress.json" for run in (output, whole)]
    assert final[0].read_bytes() == final[1].read_bytes()
    assert capfd.readouterr().err.count("looks like reward hacking") == len(rang(whole)) - 1


def test_an_alarm_at_the_last_step_stops_nothing(collapsed, tmp_path):
    settings, whole = collapsed
    last = rang(whole)[-1]
    shutil.copytree(whole, tmp_path / "run")
    go(
        settings,
        tmp_path,
        steps=last,
        on_hacking="stop",
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "step_000006"),
    )
    assert rang(tmp_path / "run")[-1] == last and saved(tmp_path / "run")[-1] == f"step_{last:06d}"


def test_off_looks_at_nothing(tiny, tmp_path):
    output = go(changed(tiny, guidance={"kind": "none"}), tmp_path, steps=1, on_hacking="off")
    assert not [key for line in untimed(output) for key in line if key.startswith("hacking/")]
    progress = json.loads((output / "checkpoints" / "step_000001" / "progress.json").read_text())
    assert progress["evaluations"] == {}


def test_a_resumed_run_compares_with_what_measured_the_same(collapsed, tmp_path, capfd):
    """An older checkpoint remembers nothing, which is no reason to warn."""
    settings, whole = collapsed
    for name, sampling, remembers in (("same", 2, True), ("other", 3, True), ("older", 2, False)):
        output = shutil.copytree(whole, tmp_path / name)
        checkpoint = output / "checkpoints" / "step_000006"
        if not remembers:
            forge(checkpoint, {"step": 6, "num_tokens": 1, "skipped_in_a_row": 0})
        run = {"output_dir": str(output), "steps": 7, "resume_from_checkpoint": str(checkpoint)}
        again = changed(settings, rollout={"micro_batch": 4, "steps": sampling * 2})
        capfd.readouterr()
        go(again, tmp_path, **run)
        assert ("hacking/reward" in untimed(output)[-1]) == (name == "same")
        told = "the hacking alarm compares from here on only" in capfd.readouterr().err
        assert told == (name == "other")


def test_what_makes_evaluations_comparable(tiny, tmp_path):
    config = resolved(tiny, tmp_path)
    prints = {"eval": {"prompts": "a"}, "reward": {"weights": "b", "commit": "c"}, "judge": {"weights": "d"}}
    same = basis(config, prints)

    def now(**sections) -> str:
        return basis(resolved(changed(tiny, **sections), tmp_path), prints)

    assert now(run={"steps": 9}, judge={"path": "elsewhere"}, rollout={"micro_batch": 1}) == same
    assert now(reward={"path": "elsewhere"}, optim={"learning_rate": 0.5}, guidance={"eta": 2.0}) == same
    assert basis(config, prints | {"reward": {"weights": "b"}, "model": {}}) == same
    others = [basis(config, prints | {name: {"weights": "z"}}) for name in prints]
    others += [now(rollout={"temperature": 0.5}), now(reward={"weight": 2.0}), now(judge={"max_length": 64})]
    others += [now(reward={"functions": {"math:sqrt": 1.0}}), now(reward={"functions": {"math:sqrt": 2.0}})]
    assert len({same, *others}) == 1 + len(others)


def forge(checkpoint: Path, progress: dict) -> None:
    """Write another progress.json into a checkpoint, and its manifest to fit."""
    content = json.dumps(progress).encode()
    (checkpoint / "progress.json").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["progress.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------------------ report
def test_the_report_names_words_guards_and_alarms(collapsed):
    _, output = collapsed
    text = report.summary(output)
    first, last = (report.counted_word(output, step) for step in (0, 9))
    assert f"({first}, then {last})" in text
    assert "guards missed: eval/distinct_2 is 0." in text
    assert f"looked like reward hacking at step {', '.join(map(str, rang(output)))} (docs/hacking.md)" in text


START = {"eval/distinct_2": 0.8, "eval/length": 16.0, "eval/base_nll": 3.0, "eval/top_word": 0.1}


@pytest.mark.parametrize(
    ("last", "missed"),
    [
        ({}, []),
        ({"eval/distinct_2": 0.73, "eval/length": 12.5, "eval/base_nll": 3.49, "eval/top_word": 0.25}, []),
        ({"eval/distinct_2": 0.71}, ["eval/distinct_2 is 0.71, below 0.9 of its start, 0.8"]),
        ({"eval/length": 11.9}, ["eval/length is 11.9, below 0.75 of its start, 16"]),
        ({"eval/base_nll": 3.6}, ["eval/base_nll rose by 0.6, more than 0.5"]),
        ({"eval/top_word": 0.26}, ["eval/top_word is 0.26, above 0.25"]),
    ],
)
def test_guards(last, missed):
    found = report.guards(START, START | last)
    assert list(found) == list(report.GUARDS) and [words for words in found.values() if words] == missed
    # Runs from before a guard was measured, and numbers that are not finite.
    assert list(report.guards({}, START | last)) == ["eval/top_word"]
    assert list(report.guards(START, {"eval/length": 16.0, "eval/base_nll": None})) == ["eval/length"]


def test_an_unknown_guard_is_not_called_held(tmp_path):
    lines = [{"step": step, "eval/reward": 0.0, "eval/distinct_2": 0.8} for step in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = "guards: none missed (not measured: eval/top_word, eval/length, eval/base_nll)"
    assert expected in report.summary(tmp_path)
