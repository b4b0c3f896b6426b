"""The Python in README.md, docs/own_code.md and CONTRIBUTING.md runs as it stands there."""

import ast
import contextlib
import importlib
import io
import json
import re
import sys

import pytest
from accelerate import Accelerator
from checkpoints import PROMPTS, REPO, write_llada
from training import adapter, changed, go, resolved, tables, untimed

from rgrl.evaluation import generate_with
from rgrl.models import families, load_policy
from rgrl.rewards import Rewards
from rgrl.setup import set_up
from rgrl.types import Prompts


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPO / name).read_text(), re.S)


@pytest.fixture
def documented(tmp_path, monkeypatch) -> None:
    """CONTRIBUTING's files, importable by the names in their first lines."""
    names = []
    for block in blocks("CONTRIBUTING.md"):
        assert len(block.splitlines()) <= 32
        names.append(re.match(r"# (\w+)\.py\n", block)[1])
        (tmp_path / f"{names[-1]}.py").write_text(block)
    assert names == ["my_reward", "my_objective", "my_family", "my_evaluator", "my_tracker"]
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in names:
        sys.modules.pop(name, None)


def test_the_readme_generates_guided_text(monkeypatch):
    monkeypatch.chdir(REPO)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        [code] = [block for block in blocks("README.md") if block.startswith("import rgrl\n")]
        exec(code, {})
    texts = ast.literal_eval(printed.getvalue())
    assert len(texts) == len(set(texts)) == 4 and all(isinstance(text, str) and text for text in texts)


def test_reward_and_objective_by_dotted_path_train(documented, tiny, tmp_path):
    config = changed(
        tiny,
        objective={"name": "my_objective:objective", "beta": 0.0, "prompt_mask": 0.0},
        optim={"learning_rate": 0.1},
    )
    config = changed(config, reward={"functions": {"my_reward:brevity": 0.1}}, guidance={"kind": "none"})
    first, second = untimed(go(config, tmp_path, eval_steps=0))
    assert abs(first["kl"]) < 1e-6 < second["kl"], "the adapter starts as the base, and leaves it"
    assert first["rewards/brevity/mean"] < 0


FILES = ("my_rewards", "my_objective", "my_estimator", "my_advantage")


@pytest.fixture
def user_files(tmp_path, monkeypatch) -> None:
    """The files of docs/own_code.md, importable by the names in their first lines."""
    found = {match[1]: block for block in blocks("docs/own_code.md") if (match := re.match(r"# (\w+)\.py\n", block))}
    assert tuple(found) == FILES
    for name, block in found.items():
        (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    for name in FILES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in FILES:
        sys.modules.pop(name, None)


def test_the_documented_verifier_scores_by_its_rows(user_files):
    exact = importlib.import_module("my_rewards").exact
    rewards = Rewards(None, {"exact": exact}, {"exact": 2.0}, settings={"exact": {"tolerance": 0.5}})
    prompts = Prompts(["a", "b", "c", "d"], [{"answer": a} for a in ("4", "5", "6", None)])
    found = rewards.score(prompts, ["it is 3, no, 4.4", "5.6", "", "7"])
    assert found.total_B[:3].tolist() == [2.0, 0.0, 0.0]
    assert found.total_B[3].isnan() and found.terms["exact"][3].isnan()


def test_the_documented_verifier_objective_estimator_and_advantage_train(user_files, tiny, tmp_path):
    rows = [{"prompt": text, "answer": str(i)} for i, text in enumerate(PROMPTS)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "sums.jsonl")
    names = {
        "name": "my_objective:objective",
        "estimator": "my_estimator:estimator",
        "advantage": "my_advantage:ranked",
    }
    config = changed(
        tiny,
        data={"path": path, "eval_path": path},
        reward={"functions": {"my_rewards:exact": 1.0}, "settings": {"exact": {"tolerance": 0.5}}},
        objective={**names, "beta": 0.0, "settings": {"rate": 0.75, "down": 0.5, "scale": 2.0}},
    )
    output = go(config, tmp_path)
    assert [line["rewards/exact/none"] for line in untimed(output)[1:]] == [0, 0]
    assert {abs(row["advantage"]) for row in tables(output)["train_000001.parquet"]} == {2.0}, "the setting `scale`"
    assert adapter(output, 1) != adapter(output, 2)


def test_a_family_in_one_file_loads(documented, tmp_path, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "mine", importlib.import_module("my_family").MINE)
    folder = write_llada(tmp_path / "checkpoint")
    raw = json.loads((folder / "config.json").read_text())
    policy = load_policy(folder)
    policy.causal_lm.save_pretrained(folder)
    made = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(made | {"model_type": "my_diffusion", "mask_token_id": raw["mask_token_id"]})
    )
    again = load_policy(folder)
    assert again.family.name == "mine"
    ids_BL, attention_BL = policy.encode(["this movie"])
    assert (again.logits(ids_BL, attention_BL) == policy.logits(ids_BL, attention_BL)).all()


def test_an_evaluator_and_a_tracker(documented, tiny, tmp_path):
    run = set_up(resolved(tiny, tmp_path), Accelerator())
    generate = generate_with(run.policy, run.config)
    result = importlib.import_module("my_evaluator").Exclaims(run.policy, run.eval_prompts)(generate, 0)
    assert 0 <= result.metrics["eval/exclaims"] <= 1 and len(result.rows) == 4
    sink = importlib.import_module("my_tracker").CsvSink(tmp_path / "metrics.csv")
    sink.log(1, {"reward": 0.5})
    sink.close()
    assert (tmp_path / "metrics.csv").read_text().strip() == "1,reward,0.5"
