"""pass@k by hand and by exhaustion, and what counts as a pass."""

import itertools
import math
import statistics

import pytest
import torch

from rgrl.config import EvalConfig, RewardConfig
from rgrl.evaluation.held_out import metrics_of_parts
from rgrl.evaluation.passes import counts_of, least_of, pass_at, passes
from rgrl.rewards import load_functions


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_fraction_of_choices_with_a_pass(n):
    for passed, k in itertools.product(range(n + 1), range(1, n + 1)):
        chosen = list(itertools.combinations([1] * passed + [0] * (n - passed), k))
        assert pass_at(k, passed, n) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_pass_at_k_is_unbiased():
    """Over all outcomes of n independent completions that each pass with probability p, its mean is 1 - (1 - p)^k."""
    p, n = 0.3, 6
    for k in range(1, n + 1):
        outcomes = itertools.product((0, 1), repeat=n)
        mean = sum(pass_at(k, sum(x), n) * p ** sum(x) * (1 - p) ** (n - sum(x)) for x in outcomes)
        assert mean == pytest.approx(1 - (1 - p) ** k)


def test_its_ends_are_exact():
    for n in (1, 5, 4096):
        assert [pass_at(n, c, n) for c in (0, 1, n)] == [0.0, 1.0, 1.0]
        assert pass_at(1, n // 2, n) == pytest.approx((n // 2) / n) and pass_at(n // 2 + 1, n, n) == 1.0


def test_which_k_are_told():
    assert [counts_of(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 5],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 9],
    ]


def test_what_has_no_reward_has_not_passed_and_a_prompt_without_any_is_left_out():
    values = {3: [1.0, 0.0, None], 7: [None, None, None], 1: [0.5, None, 0.99], 2: [1.0, 1.0, 2.0]}
    assert passes(values, 1.0, 3) == pytest.approx(
        {1: statistics.mean([1 / 3, 0, 1]), 2: statistics.mean([2 / 3, 0, 1]), 3: statistics.mean([1, 0, 1])}
    )
    assert all(map(math.isnan, passes({0: [None, None]}, 1.0, 2).values()))
    assert passes({0: [-3.0], 1: [-1.0]}, -2.0, 1) == {1: 0.5}


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 2.0, -1.3, 1e-3])
def test_a_reward_in_float32_passes_at_its_own_value(value):
    assert passes({0: [torch.tensor([value]).item()]}, value, 1) == {1: 1.0}


def test_nothing_is_told_of_more_completions_than_there_are():
    for k, passed, n in ((4, 1, 3), (0, 1, 3), (1, 4, 3), (1, -1, 3), (1, 0, 0)):
        with pytest.raises(ValueError, match="k must be"):
            pass_at(k, passed, n)
    with pytest.raises(ValueError, match="2 completions, not 3"):
        passes({0: [1.0, 0.0, 1.0], 1: [1.0, 0.0]}, 1.0, 3)


def test_a_penalty_has_no_pass():
    rewards = load_functions(RewardConfig(functions={"numeric": 1.0, "length": {"settings": {"most": 9}}}))
    assert rewards.penalties == {"length"}
    rows = [{"index": i, "rewards/length": 0.0, "rewards/numeric": float(i)} for i in range(2)]
    assert metrics_of_parts(rows, rewards, EvalConfig()) == {
        "eval/rewards/length/mean": 0.0,
        "eval/rewards/length/none": 0.0,
        "eval/rewards/numeric/mean": 0.5,
        "eval/rewards/numeric/none": 0.0,
        "eval/rewards/numeric/pass_at_1": 0.5,
    }


def test_what_counts_as_a_pass():
    functions = {"exact", "penalty"}
    assert least_of("exact", [0.0, None, 1.0, 0.5], {}, functions) == 1.0
    assert least_of("penalty", [0.0, -0.1], {}, functions) is None
    assert least_of("exact", [0.0, 2.0], {}, functions) is None
    assert least_of("exact", [0.0, 2.0], {"exact": 2.0}, functions) == 2.0
    assert (
        least_of("model", [0.5], {}, functions) is None and least_of("model", [7.0], {"model": 3.0}, functions) == 3.0
    )
