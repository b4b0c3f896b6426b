"""How sure a mean over a few dozen prompts is: Student's t."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

# Beyond as many degrees of freedom the distribution is the normal one for every purpose here, and the sum gets long.
_MANY = 2000


def t_tail(t: float, freedom: int) -> float:
    """The probability that Student's t with so many degrees of freedom (at least 1) is above `t`.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if math.isnan(t):
        return math.nan
    n = min(freedom, _MANY + freedom % 2)
    theta = math.atan2(t, math.sqrt(n))
    sine, cosine = math.sin(theta), math.cos(theta)
    # The terms of the sum: cos^k times (2 4 ... (k-1)) / (3 5 ... k) for odd n, (1 3 ... (k-1)) / (2 4 ... k) for even.
    term, total = (cosine, 0.0) if n % 2 else (1.0, 0.0)
    for k in range(n % 2, n - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    inside = 2 / math.pi * (theta + sine * total) if n % 2 else sine * total  # between -t and t, with the sign of t
    return max(0.0, (1 - inside) / 2)


def t_quantile(tail: float, freedom: int) -> float:
    """The t above which Student's t with so many degrees of freedom is with probability `tail`, above 0 and below ½."""
    high = 1.0
    while t_tail(high, freedom) > tail:
        high *= 2
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > tail else (low, middle)
    return high


def binomial_tail(count: int, n: int, probability: float) -> float:
    """The probability of at least `count` successes in `n` independent trials."""
    logs = (math.log(probability), math.log1p(-probability))
    chosen = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(count, n + 1))
    return math.fsum(
        math.exp(log + k * logs[0] + (n - k) * logs[1]) for k, log in zip(range(count, n + 1), chosen, strict=True)
    )


def by_prompt(prompts: Sequence[Hashable], values: Sequence[float | None]) -> list[float | None]:
    """The mean of each prompt's values, in the order in which prompts first come; None where all of them are.

    Completions of one prompt are alike, so an interval over all of them would be too narrow; prompts are independent.
    """
    groups: dict[Hashable, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        groups.setdefault(prompt, []).extend([] if value is None else [value])
    return [math.fsum(each) / len(each) if each else None for each in groups.values()]


def intervals(rows: Sequence[Mapping[str, Any]]) -> str:
    """How sure the means of an evaluation's rows are, in words: half of each 95 % interval over prompts."""
    prompts, found = [row["index"] for row in rows], []
    parts = [name for name in rows[0] if name.startswith("rewards/")]
    for name, metric in (("reward", "reward"), *((part, f"{part}/mean") for part in parts), ("judge", "judge")):
        means = [mean for mean in by_prompt(prompts, [row[name] for row in rows]) if mean is not None]
        if len(means) > 1:
            found.append(f"eval/{metric} ± {mean_and_half(means)[1]:.3g}")
    return f"95 % intervals over {len(set(prompts))} prompts: {', '.join(found) or 'of one prompt there are none'}"


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval (Student's t); the half is NaN for a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    return mean, t_quantile(0.025, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
