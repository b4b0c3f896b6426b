"""Other people's code and files: whatever they do is one line before anything long, and nothing of a run is lost."""

import asyncio
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import PROMPTS
from processes import TRAIN, finish, start
from training import assert_same_run, changed, go, saved, tables, untimed, write

from rgrl.algo.advantages import ADVANTAGES, in_groups, zero_spread
from rgrl.cli import run
from rgrl.config import ObjectiveConfig, RewardConfig
from rgrl.errors import ConfigError
from rgrl.plugins import UserCodeError, call_user_code
from rgrl.rewards import Rewards, load_functions
from rgrl.rewards.total import TRIAL
from rgrl.runtime.stopping import StopRequests
from rgrl.tracking.report import as_text
from rgrl.trainer import train
from rgrl.types import Prompts

ROWS = [{"prompt": text, "answer": i, "level": {"of": [i]}} for i, text in enumerate(PROMPTS)]
F = "def f(prompts, completions, rows, scale=1.0): "

# A module that is named by a dotted path, and words of the line.
MODULES = [
    ("import nonesuch", ["No module named 'nonesuch'", "own.py, line 1"]),
    ("x = 1\n1 / 0", ["ZeroDivisionError", "own.py, line 2"]),
    ("import sys\nsys.exit()", ["SystemExit", "own.py, line 2"]),
    ("import sys\nsys.exit('bye')", ["SystemExit: bye", "own.py, line 2"]),
    ("import argparse\nargparse.ArgumentParser().parse_args(['--x'])", ["SystemExit: 2", "own.py, line 2"]),
    ("raise GeneratorExit('x')", ["GeneratorExit: x", "own.py, line 1"]),
    ("raise StopIteration(3)", ["StopIteration: 3", "own.py, line 1"]),
    ("class Odd(BaseException):\n    def __str__(self): raise ValueError\nraise Odd", ["Odd", "own.py, line 3"]),
    ("raise ValueError('a\\nb' + 'c' * 5000)", ["ValueError: a bcc", "...", "own.py, line 1"]),
    ("def f(:", ["SyntaxError", "own.py, line 1"]),
    ("\tx = 1\n  y = 2", ["IndentationError", "own.py, line 1"]),
    ("x = 1\0", ["null bytes"]),
    ("x = '\udcff'", ["SyntaxError", "own.py"]),
    ("import json\njson.loads('{')", ["JSONDecodeError", "own.py, line 2"]),
    ("def g(): g()\ng()", ["RecursionError", "own.py, line 1"]),
    ("def __getattr__(name): raise SystemExit(name)", ["SystemExit", "own.py, line 1"]),
    ("raise ExceptionGroup('many', [ValueError(1)])", ["ExceptionGroup: many", "own.py, line 1"]),
    ("f = 3", ["cannot be called", "3"]),
    ("", ["no attribute 'f'", "own.py"]),
]

# A reward `f`, and words of the line.
REWARDS = [
    (F + "return 1 / 0", ["raised ZeroDivisionError", "own.py, line 1"]),
    ("import sys\n" + F + "sys.exit(0)", ["raised SystemExit: 0", "own.py, line 2"]),
    (F + "quit()", ["raised SystemExit"]),
    ("class Odd(BaseException): pass\n" + F + "raise Odd('x')", ["raised Odd: x"]),
    (F + "raise StopIteration", ["raised StopIteration"]),
    (F + "f(prompts, completions, rows)", ["raised RecursionError"]),
    ("import json\n" + F + "return [json.loads(text) for text in completions]", ["JSONDecodeError", "own.py, line 2"]),
    (F + "return [1.0 / len(text) for text in completions]", ["ZeroDivisionError", "an empty one"]),
    (F + "return [row['gold'] for row in rows]", ["raised KeyError: 'gold'"]),
    ("import time\n" + F + "time.sleep(60)", ["did not return within its `time_limit` of 1 seconds"]),
    (F + "return iter(int, 1)", ["shape (3,)", "2 completions"]),
    ("def f(prompts, completions, rows):\n    yield 1.0\n    raise SystemExit", ["raised SystemExit", "line 3"]),
    (F + "return None", ["one number", "2 completions"]),
    (F + "return completions", ["one number"]),
    (F + "return '12'", ["not a str"]),
    (F + "return {0: 1.0, 1: 2.0}", ["not a dict"]),
    (F + "return {1.0, 2.0}", ["not a set"]),
    (F + "return [1.0]", ["shape (1,)"]),
    (F + "return [float('nan'), None]", ["is nan", "The answer is 42."]),
    (F + "return [1e300, 0.0]", ["is inf"]),
    (F + "return [1j, 0j]", ["one number"]),
    (F + "return [10**400, 0]", ["one number"]),
    ("async def f(prompts, completions, rows): raise SystemExit(3)", ["raised SystemExit: 3"]),
    ("import asyncio\nasync def f(p, c, r): await asyncio.sleep(60)", ["its `time_limit` of 1 seconds"]),
    ("class List(list):\n    def __iter__(self): raise OSError('x')\n" + F + "return List()", ["raised OSError: x"]),
    ("def f(): return [1.0]", ["takes ()", "prompts, completions and rows", "by name"]),
    ("def f(p, c): return [1.0]", ["takes (p, c)"]),
    ("def f(p, c, r, s): return [1.0]", ["takes (p, c, r, s)"]),
    ("def f(completions, gold): return [1.0]", ["takes 'gold'", "answer, level, prompt"]),
    ("def f(prompts, completions, gold, **kwargs): return [1.0]", ["takes 'gold'", "answer, level, prompt"]),
    ("class f:\n    def __init__(self, completions): pass", ["one number"]),
]


@pytest.fixture
def own(tiny, tmp_path, monkeypatch) -> dict:
    """Settings of a run whose only reward is `own:f`, and whose policy cannot be found: that comes later."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return changed(
        tiny,
        model={"path": "/no/such/model"},
        data={"path": str(path), "eval_path": str(path)},
        reward={"path": None, "functions": {"own:f": 1.0}, "time_limit": 1.0, "on_error": "zero"},
        judge={"path": None},
        guidance={"kind": "none"},
    )


@pytest.fixture
def trained(own, dream_dir) -> dict:
    """The same with a policy."""
    return changed(own, model={"path": str(dream_dir)}, reward={"time_limit": 60.0, "on_error": "stop"})


def module(folder: Path, source: str) -> None:
    (folder / "own.py").write_text(source, encoding="utf-8", errors="surrogateescape")


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder by its content."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def refusal(config: dict, folder: Path, capfd) -> str:
    """The one line that a run is refused with, exit code 2, with nothing written and nothing lost."""
    path = write(config, folder)
    before, here = digests(folder), os.getcwd()
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(train, str(path), [])
    lines = [line for line in capfd.readouterr().err.splitlines() if "usage: " not in line and "--x" not in line]
    assert ended.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and len(lines[0]) < 1500
    assert digests(folder) == before and os.getcwd() == here
    return lines[0]


@pytest.mark.parametrize(("source", "words"), MODULES, ids=range(len(MODULES)))
def test_a_module_may_raise_anything(source, words, own, tmp_path, capfd):
    module(tmp_path, source)
    line = refusal(own, tmp_path, capfd)
    assert "reward function" in line and not [word for word in words if word not in line], line


@pytest.mark.parametrize("key", ["name", "estimator", "advantage"])
def test_so_may_those_of_objectives_estimators_and_advantages(key, own, tmp_path, capfd):
    module(tmp_path, "raise SystemExit(7)")
    line = refusal(changed(own, objective={key: "own:f"}), tmp_path, capfd)
    assert "cannot be imported: SystemExit: 7" in line and "own.py, line 1" in line


@pytest.mark.parametrize(("source", "words"), REWARDS, ids=range(len(REWARDS)))
def test_a_bad_reward_shows_before_anything_long_whatever_on_error_says(source, words, own, tmp_path, capfd):
    module(tmp_path, source)
    line = refusal(own, tmp_path, capfd)
    assert "reward 'f'" in line and not [word for word in words if word not in line], line


SETTINGS = [
    ({"settings": {"f": {"scael": 2}}}, ["has no setting 'scael'", "scale"]),
    ({"settings": {"f": {"rows": 2}}}, ["has no setting 'rows'", "scale"]),
    ({"settings": {"g": {"scale": 2}}}, ["`reward.settings.g`", "known: f"]),
    ({"functions": {"own": 1.0}}, ["'own'", "package.module:attribute"]),
    ({"functions": {":f": 1.0}}, ["':f'", "package.module:attribute"]),
    ({"functions": {"own:": 1.0}}, ["'own:'", "package.module:attribute"]),
    ({"functions": {"..own:f": 1.0}}, ["'..own:f'", "imported"]),
    ({"functions": {"own:f": 1.0, "own.py:f": 1.0}}, ["the same name 'f'", "another `name`"]),
    ({"functions": {"random:nonesuch": 1.0}}, ["nonesuch", "random.py"]),
]


@pytest.mark.parametrize(("reward", "words"), SETTINGS, ids=range(len(SETTINGS)))
def test_bad_names_and_settings(reward, words, own, tmp_path, capfd):
    module(tmp_path, F + "return [1.0] * len(completions)")
    line = refusal(changed(own, reward=reward), tmp_path, capfd)
    assert not [word for word in words if word not in line], line


def test_settings_of_nothing_are_refused(own, tmp_path, capfd):
    assert "all three are built in" in refusal(changed(own, objective={"settings": {"a": 1}}), tmp_path, capfd)


def test_evaluation_data_must_have_the_columns_too(own, tmp_path, capfd):
    module(tmp_path, "def f(completions, answer): return [1.0] * len(completions)")
    line = refusal(changed(own, data={"eval_path": str(tmp_path / "prompts.jsonl")}), tmp_path, capfd)
    assert "takes 'answer'" in line and "`data.eval_path`" in line


# ------------------------------------------------------------------------------------------------- data files
def parquet(**columns) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


DATA = [
    ("a.jsonl", '{"prompt": "fine"}\n{"prompt": "a\\ud800b"}', ["row 1", "half a surrogate pair"]),
    ("a.json", '[{"prompt": "fine"}, {"prompt": "\\udc00"}]', ["row 1", "half a surrogate pair"]),
    ("b.json", '{"prompt": "fine"}\n{"prompt": "a", "answer": ["\\ud800"]}', ["row 1", "half a surrogate pair"]),
    ("b.jsonl", '{"prompt": ' + "[" * 10**5, ["line 1", "not JSON"]),
    ("c.json", '[{"prompt": ' + "[" * 10**5 + "]" * 10**5 + "}]", ["c.json", "cannot be read"]),
    ("c.jsonl", '{"prompt": "a", "n": ' + "9" * 5000 + "}", ["line 1", "not JSON"]),
    ("d.json", "", ["d.json", "no rows"]),
    ("e.json", "3", ["e.json", "row 0 is not a JSON object (line 1)"]),
    ("f.json", b"\0\0\0", ["f.json", "cannot be read"]),
    ("g.json", '[{"prompt": "a"}]'.encode("utf-16"), ["g.json", "cannot be read"]),
    ("h.jsonl", '{"prompt": ["x", 3]}', ["row 0", "no prompt text"]),
    ("i.jsonl", '{"prompt": [{"role": "user", "content": 3}, 4]}', ["row 0", "no prompt text"]),
    ("j.parquet", b"", ["j.parquet", "no rows"]),
    ("k.parquet", parquet(prompt=["a", "b"])[:-9], ["k.parquet", "cannot be read"]),
    ("l.parquet", parquet(prompt=[b"a", b"b"]), ["row 0", "no prompt text"]),
    ("m.parquet", parquet(prompt=["a", None]), ["row 1", "no prompt text"]),
    ("n.csv", b"prompt\ncaf\xe9\n", ["n.csv", "cannot be read"]),
    ("o.csv", 'prompt\n"a\n', ["o.csv", "cannot be read"]),
    ("p[1].json", "[1, 2", ["p[1].json", "cannot be read"]),
    ("q*.parquet", b"PAR1", ["q*.parquet", "cannot be read"]),
]


@pytest.mark.parametrize(("name", "content", "words"), DATA, ids=[name for name, _, _ in DATA])
def test_a_bad_data_file_is_one_line(name, content, words, own, tmp_path, capfd):
    module(tmp_path, F + "return [1.0] * len(completions)")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(changed(own, data={"path": str(path)}), tmp_path, capfd)
    assert not [word for word in words if word not in line], line


def test_a_prompt_of_no_tokens_is_named_by_its_row(trained, llada_dir, tmp_path, capfd):
    """To a tokenizer that drops zero-width spaces, as many normalizers do."""
    module(tmp_path, F + "return [1.0] * len(completions)")
    model = shutil.copytree(llada_dir, tmp_path / "deaf")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = tmp_path / "blank.jsonl"
    rows.write_text('{"prompt": "fine"}\n{"prompt": "a\u200b"}\n{"prompt": "\u200b\u200b"}\n', encoding="utf-8")
    line = refusal(changed(trained, model={"path": str(model)}, data={"path": str(rows)}), tmp_path, capfd)
    assert "blank.jsonl: row 2 has a prompt of no tokens" in line


# ------------------------------------------------------------------------------- objectives, estimators, advantages
HEAD = """
import torch
from rgrl.algo.estimators import Estimator, draw_one_step
from rgrl.algo.objectives import Objective, reinforce
from rgrl.types import LossOutputs, NoiseDraw
"""
ALGORITHMS = [
    ("advantage", "def f(reward_B, G): return reward_B", ["(reward_B, G, config)", "positional"]),
    ("advantage", "def f(reward_B, G, config): return reward_B.tolist()", ["must be a tensor", "list"]),
    ("advantage", "def f(reward_B, G, config): return reward_B[:, None]", ["shape (4, 1)", "expected (4,)"]),
    ("advantage", "def f(reward_B, G, config): raise SystemExit(0)", ["raised SystemExit: 0", "own.py, line 6"]),
    ("advantage", "def f(reward_B, G, config): return config.settings['x']", ["KeyError: 'x'", "own.py, line 6"]),
    ("advantage", "f = 3", ["not of the type Callable"]),
    ("name", "f = Objective(lambda inputs: None)", ["`loss` must take (inputs, config)"]),
    ("name", "f = Objective(lambda inputs, config: inputs.logp_BC.sum())", ["must return LossOutputs", "Tensor"]),
    ("name", "f = Objective(lambda i, c: LossOutputs(i.logp_BC, i.logp_BC.sum()))", ["loss_sum has shape (2, 2)"]),
    ("name", "f = Objective(lambda i, c: LossOutputs(i.logp_BC.detach().sum(), i.mask_BC.sum()))", ["no gradient"]),
    ("name", "f = Objective(lambda i, c: LossOutputs(i.logp_BC.sum(), 8))", ["'int' object", "own.py, line 6"]),
    (
        "name",
        "f = Objective(lambda i, c: LossOutputs(i.logp_BC.sum(), i.mask_BC.sum(), {'m': 1.0}))",
        ["`m` of the loss must be a tensor"],
    ),
    ("name", "f = Objective(lambda i, c: 1 / 0)", ["objective 'own:f'", "ZeroDivisionError", "own.py, line 6"]),
    ("estimator", "f = Estimator(lambda rollout, config: None)", ["`draw` must take (rollout, config, generators)"]),
    ("estimator", "f = Estimator(lambda r, c, g: None)", ["must return a NoiseDraw"]),
    ("estimator", "f = Estimator(draw_one_step, estimate=lambda v: v)", ["`estimate` must take (values, rollout"]),
    ("estimator", "f = Estimator(draw_one_step, estimate=lambda *a: {})", ["`logp` among them"]),
    (
        "estimator",
        "f = Estimator(draw_one_step, estimate=lambda v, r, *a: {'logp': torch.zeros(3)})",
        ["`logp` of `estimate` has the shape (3,)"],
    ),
    (
        "estimator",
        "def draw(r, c, g):\n    n = draw_one_step(r, c, g)\n"
        "    return NoiseDraw(n.hidden_KBL.long(), n.weight_KBC, n.count_BC)\nf = Estimator(draw)",
        ["`hidden_KBL` of the noise", "torch.bool"],
    ),
]


@pytest.mark.parametrize(("key", "source", "words"), ALGORITHMS, ids=range(len(ALGORITHMS)))
def test_a_bad_objective_estimator_or_advantage_shows_in_a_trial(key, source, words, trained, tmp_path, capfd):
    module(
        tmp_path,
        HEAD.lstrip("\n").rstrip("\n") + "\n" * 2 + source + "\n" + F.replace(" f(", " g(") + "return [1.0] * 2",
    )
    short = {"max_completion_length": 2, "steps": 2}
    config = changed(trained, objective={key: "own:f", "beta": 0.0}, rollout=short, data={"eval_path": None})
    config = changed(config, reward={"functions": {"own:g": 1.0}})
    line = refusal(config, tmp_path, capfd)
    assert "'own:f'" in line and not [word for word in words if word not in line], line


def test_what_they_change_reaches_nothing(trained, tmp_path):
    source = """
import torch
from rgrl.algo.advantages import zscore
from rgrl.algo.estimators import Estimator, draw_one_step
from rgrl.algo.objectives import Objective, reinforce

def g(prompts, completions, rows): return [float(len(text)) for text in completions]

def advantage(reward_B, G, config):
    found = zscore(reward_B.clone(), G, config)
    reward_B.zero_(), config.settings.clear()
    return found.double()

def draw(rollout, config, generators):
    noise = draw_one_step(rollout, config, generators)
    noise = NoiseDraw(noise.hidden_KBL, noise.weight_KBC, noise.count_BC.clone())
    rollout.canvas_BL.zero_(), rollout.completion_mask_BC.zero_()
    config.beta = 9.0
    return noise

def loss(inputs, config):
    inputs.advantage_B.mul_(2.0)
    out = reinforce(inputs, config)
    half = LossOutputs(out.loss_sum / 2, out.denominator)
    return half

from rgrl.types import LossOutputs, NoiseDraw
estimator, objective = Estimator(draw), Objective(loss)
"""
    module(tmp_path, source)
    trained = changed(trained, reward={"functions": {"own:g": 1.0}})
    plain = changed(trained, objective={"beta": 0.0})
    odd = {"name": "own:objective", "estimator": "own:estimator", "advantage": "own:advantage", "settings": {"a": 1}}
    go(plain, tmp_path, output_dir="plain")
    go(changed(plain, objective=odd), tmp_path, output_dir="odd")
    assert_same_run(tmp_path / "odd", tmp_path / "plain", 2)


# ------------------------------------------------------------------------------------------------- rewards in a run
def scores(function, rows=None, completions=("a", "bb", "ccc", ""), settings=None, **rewards) -> torch.Tensor:
    rows = [{} for _ in completions] if rows is None else rows
    prompts = Prompts([f"prompt {i}" for i in range(len(rows))], rows)
    known = Rewards(None, {"f": function}, {"f": 2.0}, settings={"f": settings or {}}, **rewards)
    return known.score(prompts, list(completions)).total_B


class Called:
    def __call__(self, completions, n, **more):
        assert sorted(more) == ["prompts", "rows", "sign"]
        return [a * b for a, b in zip(n, more["sign"], strict=True)]


async def later(completions, n):
    await asyncio.sleep(0.001)
    return n


def varied(prompts, completions, *rest):
    return [row["n"] for row in rest[0]]


def only_by_position(prompts, completions, /, n):
    return n


FORMS = {
    "by position": lambda p, c, r: [row["n"] for row in r],
    "by name": lambda completions, n: n,
    "all by name": lambda prompts, completions, rows: [row["n"] for row in rows],
    "in another order": lambda rows, n, completions, prompts: n if prompts[0] == "prompt 0" else None,
    "TRL": lambda prompts, completions, n, **kwargs: [x * (kwargs["sign"][0] == "+") for x in n],
    "TRL, all": lambda **kwargs: kwargs["n"],
    "an object": Called(),
    "async": later,
    "the rest": varied,
    "by position only": only_by_position,
    "a tensor": lambda completions, n: torch.tensor(n, requires_grad=False),
    "with gradient": lambda completions, n: torch.tensor(n, dtype=torch.float64, requires_grad=True) * 1,
    "tensors": lambda completions, n: [torch.tensor(x, requires_grad=True) for x in n],
    "an array": lambda completions, n: torch.tensor(n).numpy(),
    "a generator": lambda completions, n: (x for x in n),
    "under inference mode": torch.inference_mode()(lambda p, c, r: torch.tensor([row["n"] for row in r])),
}


@pytest.mark.parametrize("form", FORMS)
def test_arguments_and_results_take_these_forms(form):
    sign = [1, 1, 1, 1] if form == "an object" else ["+"] * 4
    rows = [{"n": float(i), "sign": s} for i, s in enumerate(sign)]
    found_B = scores(FORMS[form], rows)
    assert found_B.tolist() == [0.0, 2.0, 4.0, 6.0] and found_B.dtype == torch.float32
    assert not found_B.requires_grad and not found_B.is_inference()


def test_settings_go_to_parameters_or_together_and_are_copies():
    settings = {"scale": 3.0, "names": ["x"]}

    def by_name(completions, scale, names):
        names.append("y")
        return [scale * len(names)] * len(completions)

    def together(prompts, completions, rows, scale, names, settings):
        return [float(settings == {"scale": scale, "names": names})] * len(completions)

    for _ in range(2):
        assert scores(by_name, settings=settings)[0] == 12.0
        assert scores(together, settings=settings)[0] == 2.0
        assert scores(lambda p, c, r, scale, **more: [scale] * 4, settings=settings)[0] == 6.0


def test_a_returned_buffer_that_is_used_again_does_not_change_what_was_returned():
    buffer = torch.zeros(4)
    first_B = scores(lambda p, c, r: buffer.add_(1.0))
    scores(lambda p, c, r: buffer.add_(1.0))
    assert first_B.tolist() == [2.0] * 4


def test_what_a_reward_changes_reaches_nobody_else():
    def spoil(prompts, completions, rows):
        prompts[:], completions[1:] = [], ["changed"]
        for row in rows:
            row.pop("n").append(9)  # each has a row of its own, also where a prompt stands in several rows
        return [1.0] * 4

    row = {"n": [1]}
    prompts, completions = Prompts(["a"] * 4, [row] * 4), ["w", "x", "y", "z"]
    seen = []
    functions = {"spoil": spoil, "look": lambda p, c, r: seen.append((p, c, r)) or [0.0] * 4}
    Rewards(None, functions, dict.fromkeys(functions, 1.0)).score(prompts, completions)
    assert seen == [(["a"] * 4, ["w", "x", "y", "z"], [{"n": [1]}] * 4)]
    assert prompts.rows == [{"n": [1]}] * 4 and completions == ["w", "x", "y", "z"]


def test_a_third_name_that_is_no_column_is_given_the_rows_and_told():
    rewards = Rewards(None, {"f": lambda prompts, completions, gold: [len(row) for row in gold]}, {"f": 1.0})
    [note] = rewards.dry_run(Prompts(["a"], [{"answer": 1}]))
    assert "'gold' gets the rows" in note and "(answer)" in note
    rewards.functions["f"] = lambda prompts, completions, _: [0.0] * len(completions)
    assert not rewards.dry_run(Prompts(["a"], [{"answer": 1}]))


def test_columns_are_those_of_the_data_not_of_the_batch():
    rewards = Rewards(None, {"f": lambda completions, gold: [g if g is None else float(g) for g in gold]}, {"f": 1.0})
    rewards.dry_run(Prompts(["a", "b"], [{}, {"gold": 3}]))
    assert rewards.score(Prompts(["a"], [{}]), ["x"]).total_B.isnan().all()


# ------------------------------------------------------------------------------------------------- no reward
def test_none_leaves_a_term_out_of_the_sum():
    functions = {"a": lambda p, c, r: [1.0, None, 3.0, None], "b": lambda p, c, r: [None, None, 0.5, 0.25]}
    rewards = Rewards(None, functions, {"a": 2.0, "b": -1.0})
    found = rewards.score(Prompts(list("wxyz"), [{}] * 4), list("wxyz"))
    total_B, terms = found.total_B, found.terms
    torch.testing.assert_close(total_B, torch.tensor([2.0, math.nan, 5.5, -0.25]), equal_nan=True)
    assert terms["a"].isnan().tolist() == [False, True, False, True] and found.counts.unrated == {"a": 2, "b": 2}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_completion_without_a_reward_is_left_out_of_its_group(name):
    config, nan = ObjectiveConfig(), math.nan
    reward_B = torch.tensor(
        [1.0, 2.0, 4.0, 0.5, nan, 2.0, 4.0, nan, nan, nan, 3.0, nan, nan, nan, nan, nan, 2.0, 2.0, 2.0, nan]
    )
    found_PG = in_groups(ADVANTAGES[name], reward_B, 4, config).view(-1, 4)
    whole = ADVANTAGES[name](reward_B[:4], 4, config)
    pair = ADVANTAGES[name](torch.tensor([2.0, 4.0]), 2, config)
    assert torch.equal(found_PG[0], whole) and torch.equal(found_PG[1], torch.tensor([0.0, *pair.tolist(), 0.0]))
    assert not found_PG[2:].any() and zero_spread(reward_B, 4).tolist() == [False, False, True, True, True]


def test_a_run_goes_on_where_nothing_has_a_reward(trained, tmp_path):
    module(
        tmp_path,
        "def f(completions, answer): return [None if a % 2 else float(len(c)) for c, a in zip(completions, answer)]",
    )
    config = changed(trained, run={"steps": 3, "prompts_per_device": 1}, rollout={"num_generations": 4})
    output = go(config, tmp_path, eval_steps=1)
    rows = {step: tables(output)[f"train_{step:06d}.parquet"] for step in (1, 2, 3)}
    lines = untimed(output)
    for step, table in rows.items():
        rated = [row["reward"] for row in table if row["reward"] is not None]
        # Of the evaluation 2, and of that before the first step.
        assert lines[step]["rewards/f/none"] == sum(row["reward"] is None for row in table) + (4 if step == 1 else 2)
        assert lines[step]["reward"] == (pytest.approx(sum(rated) / len(rated)) if rated else None)
        assert all(row["advantage"] == 0.0 for row in table if row["reward"] is None)
    assert {None} in ({row["reward"] for row in table} for table in rows.values())
    evaluated = [row["reward"] for row in tables(output)["eval_000003.parquet"]]
    known = [reward for reward in evaluated if reward is not None]
    assert len(known) == 2 and lines[3]["eval/reward"] == pytest.approx(sum(known) / 2)
    assert math.isfinite(lines[3]["hacking/reward"]) and "-  " in as_text(output, None)


# ------------------------------------------------------------------------------------------------- the boundary
def test_any_exception_names_the_reward_the_file_and_the_line_and_is_the_cause():
    with pytest.raises(
        UserCodeError, match=r"^thing raised ZeroDivisionError: .*test_foreign\.py, line \d+\)$"
    ) as caught:
        call_user_code("thing", lambda: 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(UserCodeError, match=r"^thing raised SystemExit"):
        call_user_code("thing", sys.exit)
    with pytest.raises(UserCodeError, match=r"^thing did not return within its `time_limit` of 0\.05 seconds$"):
        call_user_code("thing", lambda: time.sleep(5), 0.05)


@pytest.mark.parametrize("on_error", ["stop", "zero"])
def test_a_ctrl_c_is_not_the_rewards(on_error):
    with pytest.raises(KeyboardInterrupt):
        scores(lambda p, c, r: signal.raise_signal(signal.SIGINT), on_error=on_error)


def test_a_ctrl_c_that_is_only_recorded_goes_on_and_a_second_is_obeyed():
    with StopRequests(0) as requests:
        assert scores(lambda p, c, r: signal.raise_signal(signal.SIGINT) or [1.0] * 4)[0] == 2.0
        assert requests.asked()[0] == 1
        with pytest.raises(KeyboardInterrupt):
            call_user_code("thing", lambda: signal.raise_signal(signal.SIGINT))


def test_another_thread_calls_rewards_but_has_no_time_limit():
    found = []

    def work():
        found.append(scores(lambda p, c, r: [1.0] * 4).tolist())
        with pytest.raises(ConfigError, match="main thread"):
            scores(lambda p, c, r: [1.0] * 4, time_limit=1.0)
        found.append("refused")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[2.0] * 4, "refused"]


def test_counts_of_calls_add_up_and_keep_the_first_problem():
    def fails(prompts, completions, rows):
        raise ValueError(completions[0])

    rewards = Rewards(None, {"f": fails, "g": lambda p, c, r: [None]}, {"f": 1.0, "g": 1.0}, on_error="zero")
    one, two = (rewards.score(Prompts(["p"], [{}]), [text]) for text in ("first", "second"))
    both = one.counts + two.counts
    assert one.total_B.tolist() == [0.0] and (both.failed, both.unrated, both.truncated) == ({"f": 2}, {"g": 2}, 0)
    assert list(both.problems) == ["f"] and "ValueError: first" in both.problems["f"]
    [warning] = both.warnings()
    assert warning.startswith("reward 'f' raised ValueError: first (") and warning.endswith("got 0 (reward.on_error)")


def test_the_dry_run_is_one_call_on_two_completions_and_leaves_no_trace_in_random_numbers(own, tmp_path):
    calls = []

    def f(prompts, completions, rows):
        calls.append((prompts, completions, rows))
        return torch.rand(len(completions))

    rewards = load_functions(RewardConfig(functions={"math:sqrt": 1.0}))
    rewards.functions["sqrt"] = f
    state = torch.get_rng_state()
    rewards.dry_run(Prompts(["one"], [{"n": 1}]))
    assert calls == [(["one", "one"], list(TRIAL), [{"n": 1}] * 2)] and torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------- real processes
DEEDS = """
import sys

calls = 0

def count():
    global calls
    calls += 1
    return calls

def leave(prompts, completions, rows):
    if count() == 5:  # after the trial, two evaluations and a step
        sys.exit(0)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.slow
def test_a_reward_that_exits_ends_the_run_as_one_that_raises(trained, tmp_path, monkeypatch):
    module(tmp_path, DEEDS)
    monkeypatch.chdir(tmp_path)
    config = changed(trained, reward={"functions": {"own:leave": 1.0}}, run={"eval_steps": 1})
    printed = finish(start(TRAIN, "--config", write(config, tmp_path)), 2)
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "reward 'leave' raised SystemExit: 0" in line and "own.py, line 13" in line and "Traceback" not in printed
    assert saved(tmp_path / "run") == ["step_000001"]


@pytest.mark.parametrize(
    ("change", "restore", "what"),
    [
        (
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_default_dtype(torch.float32),
            "default type",
        ),
        (lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True), "grad mode"),
        (
            lambda: torch.set_autocast_enabled("cpu", True),
            lambda: torch.set_autocast_enabled("cpu", False),
            "autocast",
        ),
    ],
)
def test_what_would_change_numbers_in_silence_is_an_error(change, restore, what):
    """Nothing is put back for user code, so a change to how torch computes must not pass unseen."""
    try:
        with pytest.raises(UserCodeError, match=f"mine left torch's {what} changed"):
            call_user_code("mine", change)
    finally:
        restore()
    assert call_user_code("mine", torch.get_default_dtype) == torch.float32
