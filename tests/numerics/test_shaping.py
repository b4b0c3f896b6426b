"""Parts of the reward: names, settings, and how they are clipped, made conditional and normalised."""

import math
import re
import sys

import pytest
import torch
import yaml
from checkpoints import REPO

from rgrl.config import Config, RewardConfig
from rgrl.config.load import as_yaml, load_config
from rgrl.errors import ConfigError
from rgrl.rewards import ClassifierScores, RewardResult, Rewards, load_functions
from rgrl.rewards.total import Shape, normalised, weighted_sum
from rgrl.types import Prompts


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    (tmp_path / "own_shaped.py").write_text(
        "def words(prompts, completions, rows, scale=1.0):\n    return [scale * len(c.split()) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_shaped", None)


def scored(functions, completions, answers=None, **reward):
    answers = answers if answers is not None else ["4"] * len(completions)
    prompts = Prompts(["p"] * len(completions), [{"answer": answer} for answer in answers])
    rewards = load_functions(RewardConfig(functions=functions, **reward))
    return rewards, rewards.score(prompts, completions)


def test_verifiers_and_python_add_up_by_name_and_weight(own_rewards):
    functions = {
        "numeric": 2.0,
        "own_shaped:words": {"weight": 0.5, "settings": {"scale": 10}, "clip": [0, 15], "name": "long"},
        "boxed": {"function": "pattern", "settings": {"pattern": "boxed"}},
    }
    _, found = scored(functions, ["4", "is 5", "\\boxed{4} or so"])
    total_B, terms = found.total_B, found.terms
    assert list(terms) == ["numeric", "long", "boxed"]
    assert [term.tolist() for term in terms.values()] == [[1, 0, 1], [10, 15, 15], [0, 0, 1]]
    assert total_B.tolist() == [7.0, 7.5, 10.5]


def test_a_part_is_paid_only_where_another_holds(own_rewards):
    functions = {
        "own_shaped:words": {"only_if": "numeric"},
        "numeric": 1.0,
        "chain": {"function": "own_shaped:words", "name": "chained", "only_if": "words"},
    }
    _, found = scored(functions, ["is 4", "is 5", "any"], ["4", "4", None])
    total_B, terms = found.total_B, found.terms
    assert terms["words"].tolist()[:2] == [2.0, 0.0] == terms["chained"].tolist()[:2]
    assert terms["words"][2].isnan() and total_B[2].isnan(), "nobody knows if the condition holds"
    assert total_B.tolist()[:2] == [5.0, 0.0] and found.counts.unrated["numeric"] == 1


def test_a_reward_model_is_shaped_as_well():
    class Model:
        name = "model"

        def score(self, prompts, completions):
            return ClassifierScores(torch.tensor([-9.0, 9.0, 1.0, 0.0]), truncated=0)

    rewards = Rewards(Model(), {"f": lambda p, c, r: [1.0, 1.0, 0.0, None]}, {"model": 1.0, "f": 1.0})
    rewards.shapes = {"model": Shape(clip=(-2.0, 2.0), only_if="f")}
    found = rewards.score(Prompts(["p"] * 4, [{}] * 4), ["a", "b", "c", "d"])
    total_B, terms = found.total_B, found.terms
    assert terms["model"].tolist()[:3] == [-2.0, 2.0, 0.0] and total_B.tolist()[:3] == [-1.0, 3.0, 0.0]
    assert terms["model"][3].isnan()


def test_normalised_parts_weigh_alike_whatever_their_scale(own_rewards):
    functions = {"numeric": {"normalise": True}, "own_shaped:words": {"normalise": True, "settings": {"scale": 1000}}}
    completions = ["4", "is 4", "5", "is 5", "4", "4", "4", "4"]
    rewards, found = scored(functions, completions)
    total_B, terms = found.total_B, found.terms
    assert total_B[:4].tolist() == [1001, 2001, 1000, 2000], "what is shown stays as it was"
    compared_B = rewards.for_advantages(found, 4)
    one = 0.5 / math.sqrt(1 / 3)
    assert compared_B.tolist() == pytest.approx([0, 2 * one, -2 * one, 0, 0, 0, 0, 0], abs=1e-6)
    halves = [
        rewards.for_advantages(RewardResult(total_B[i : i + 4], {n: t[i : i + 4] for n, t in terms.items()}), 4)
        for i in (0, 4)
    ]
    assert torch.equal(torch.cat(halves), compared_B), "groups do not know of each other"


def test_without_normalising_completions_are_compared_by_the_sum_itself():
    rewards, found = scored({"numeric": 1.0}, ["4", "5"])
    assert rewards.for_advantages(found, 2) is found.total_B


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_any_scale_is_normalised_and_rounding_is_not(scale):
    one = 0.5 / math.sqrt(1 / 3)
    values = torch.tensor([1.0, 2.0, 1.0, 0.0]) * scale
    assert normalised(values, 4).tolist() == pytest.approx([0, one * math.sqrt(2), 0, -one * math.sqrt(2)], rel=1e-5)
    almost = torch.tensor([1.0, 1.0 + 2**-23, 1.0, 1.0]) * scale
    assert len(set(almost.tolist())) == 2 and normalised(almost, 4).tolist() == [0.0] * 4


def test_a_part_of_weight_0_rates_nothing():
    """As documented: a completion that no part of the sum rates has no reward, and does not count as one of 0."""
    terms = {"own": torch.tensor([math.nan, 2.0]), "watched": torch.tensor([7.0, 7.0])}
    total_B = weighted_sum(terms, {"own": 0.5, "watched": 0.0})
    assert total_B[0].isnan() and total_B[1] == 1.0
    assert weighted_sum(terms, {"own": 0.0, "watched": 0.0}).tolist() == [0.0, 0.0]


def test_a_sum_beyond_float32_is_one_line():
    terms = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0, math.nan])}
    for other in (-1e39, 1.0):
        with pytest.raises(ConfigError, match=r"too large for float32; their weights are a 1e\+39, b"):
            weighted_sum(terms, {"a": 1e39, "b": other})


def test_normalising_leaves_out_what_has_no_reward():
    nan = math.nan
    found_B = normalised(torch.tensor([1.0, nan, 3.0, nan, nan, nan, 5.0, nan, nan]), 3)
    assert found_B.isnan().tolist() == [False, True, False, True, True, True, False, True, True]
    assert found_B[[0, 2, 6]].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5), 0.0])


BAD = [
    ({"numeric": {"only_if": "nobody"}}, "called 'nobody'"),
    ({"numeric": {"only_if": "numeric"}}, "in a circle: numeric -> numeric"),
    ({"numeric": {"only_if": "exact"}, "exact": {"only_if": "numeric"}}, "in a circle"),
    ({"numeric": {"only_if": "repetition"}, "repetition": 1.0}, "would never hold"),
    ({"numeric": 1.0, "exact": {"name": "numeric"}}, "same name"),
    ({"numeric": {"name": "a/b"}}, "no name for metrics"),
    ({"numerical": 1.0}, "known: numeric, exact, math"),
    ({"numeric": {"settings": {"where": "there"}}}, "`numeric.where` must be one of"),
    ({"math": {"time_limit": 0}}, "above 0 seconds"),
]


@pytest.mark.parametrize(("functions", "words"), BAD)
def test_what_cannot_work_is_one_line(functions, words):
    with pytest.raises(ConfigError) as error:
        load_functions(RewardConfig(functions=functions))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_settings_of_a_part_that_cannot_work():
    for reward, words in [
        (
            {"settings": {"numeric": {"where": "tags"}}, "functions": {"numeric": {"settings": {"where": "text"}}}},
            "keep one",
        ),
        ({"functions": {"numeric": 1.0}, "clip": [0, 1]}, "`reward.path`, which is not set"),
    ]:
        with pytest.raises(ConfigError, match=words):
            load_functions(RewardConfig(**reward))
    for reward, words in [
        (
            {"functions": {"numeric": {"weights": 1}}},
            "unknown key `reward.functions.numeric.weights`; did you mean `weight`?",
        ),
        ({"functions": {"numeric": {"clip": [2, 1]}}}, "a lower and a higher limit"),
        ({"functions": {"numeric": {"time_limit": -1}}}, "`reward.functions.numeric.time_limit` must be at least 0"),
    ]:
        with pytest.raises(ConfigError) as error:
            RewardConfig(**reward)
        assert words in str(error.value)


def test_overrides_reach_into_a_part_and_a_run_writes_what_it_reads(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "{model: {path: a}, data: {path: b}, run: {output_dir: c}, guidance: {kind: none}, "
        "reward: {functions: {numeric: 1.0, 'own.module:f': 2}}}"
    )
    words = ["--reward.functions.numeric.settings.tolerance", "0.5", "--reward.functions.own.module:f.clip", "[0, 1]"]
    config = load_config(path, [*words, "--reward.functions.exact", "3"])
    numeric, own = config.reward.functions["numeric"], config.reward.functions["own.module:f"]
    assert (numeric.weight, numeric.settings) == (1.0, {"tolerance": 0.5}) and (own.weight, own.clip) == (2.0, [0, 1])
    assert config.reward.functions["exact"] == 3.0
    path.write_text(as_yaml(config))
    assert load_config(path) == config and isinstance(config, Config)
    with pytest.raises(ConfigError, match="at least 2"):
        load_config(path, ["--rollout.num_generations", "1", "--reward.functions.numeric.normalise", "true"])


@pytest.mark.parametrize("where", ["auto", "boxed"])  # of the trial's completions none holds a box
def test_math_without_its_package_says_what_to_install(where, tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rewards = load_functions(RewardConfig(functions={"math": {"settings": {"where": where}}}))
    with pytest.raises(ConfigError, match=r"verifier `math` needs the package math-verify.*not here.*\[math\]"):
        rewards.dry_run(Prompts(["p"], [{"answer": "1"}]))


def test_the_documented_settings_load(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def brevity(p, c, r): return [0.0] * len(c)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    blocks = re.findall(r"```yaml\n(.*?)```", (REPO / "docs/verifiers.md").read_text(), re.S)
    chosen = [yaml.safe_load(block)["reward"] for block in blocks if "numeric: 1.0" in block]
    assert len(chosen) == 3
    for reward in chosen:
        assert "numeric" in load_functions(RewardConfig(**reward)).functions
    sys.modules.pop("my_rewards", None)
