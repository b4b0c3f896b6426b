"""How often a reward is passed: pass@k, from n completions of each prompt."""

import math
from collections.abc import Mapping, Sequence

import numpy


def pass_at(k: int, passed: int, n: int) -> float:
    """The probability that at least one of k completions passes, drawn without repetition from n of which some passed.

    Over prompts its mean is an unbiased estimate of pass@k: 1 - C(n - passed, k) / C(n, k) (Chen et al. 2021, arXiv
    2107.03374). With k = n it says whether one passed, with k = 1 which fraction did. Raises `ValueError` for more
    than there are: from n completions nothing is known of k > n.
    """
    if not 1 <= k <= n or not 0 <= passed <= n:
        raise ValueError(
            f"pass@{k} of {n} completions of which {passed} passed: k must be 1 ... n, and 0 ... n can pass"
        )
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def counts_of(n: int) -> list[int]:
    """For which k pass@k is told of n completions: the powers of two below n, and n."""
    return [*(2**i for i in range((n - 1).bit_length())), n]


def least_of(
    name: str, values: Sequence[float | None], named: Mapping[str, float], functions: set[str]
) -> float | None:
    """From which value on this reward counts as passed; None where nothing says so.

    `named` are the limits that the settings name (`eval.passes`). A function that they do not name counts at 1, if none
    of its values in this evaluation is outside 0 ... 1.
    """
    if name in named or name not in functions:
        return named.get(name)
    return 1.0 if all(0.0 <= value <= 1.0 for value in values if value is not None) else None


def _float32(value: float) -> float:
    """The nearest float32, infinite where it is too large for one."""
    with numpy.errstate(over="ignore"):
        return float(numpy.float32(value))


def passes(values: Mapping[int, Sequence[float | None]], least: float, n: int) -> dict[int, float]:
    """pass@k by k, the mean over prompts; `values` are the rewards of each prompt's n completions, by prompt.

    A completion without a reward has not passed. A prompt of which no completion has one is left out; NaN if that
    leaves none. Rewards are float32, so `least` is compared as such: a reward of 0.7 is at least 0.7. Raises
    `ValueError` for a prompt that has not n.
    """
    if odd := [len(each) for each in values.values() if len(each) != n]:
        raise ValueError(f"a prompt has {odd[0]} completions, not {n}")
    least = _float32(least)
    rated = [each for each in values.values() if any(value is not None for value in each)]
    passed = [sum(value is not None and value >= least for value in each) for each in rated]
    if not rated:
        return dict.fromkeys(counts_of(n), math.nan)
    return {k: math.fsum(pass_at(k, c, n) for c in passed) / len(passed) for k in counts_of(n)}
