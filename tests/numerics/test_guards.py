"""Guards and their noise, against slow versions of themselves and tables in print; and when the hacking alarm rings."""

import json
import math
import random
import statistics
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgrl.evaluation.alarm import FALSE_ALARMS, History, change, look, measure
from rgrl.evaluation.guards import distinct, distinct_without, empty, is_function_word, top_word, words
from rgrl.evaluation.intervals import binomial_tail, mean_and_half, t_quantile, t_tail

TEXTS = st.lists(st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=6).map(" ".join), max_size=6)


@given(TEXTS, st.sampled_from([1, 2, 3]))
def test_distinct_and_what_is_left_without_a_text(texts, n):
    def slowly(texts: list[str]) -> float:
        runs = []
        for text in texts:
            parts = text.split()
            for i in range(len(parts)):
                if i + n <= len(parts):
                    runs.append(" ".join(parts[i : i + n]))
        return len({*runs}) / len(runs) if runs else 0.0

    assert distinct(texts, n) == slowly(texts)
    assert distinct_without(texts, n) == [slowly(texts[:i] + texts[i + 1 :]) for i in range(len(texts))]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The film's best: it's GOOD, isn't it?!", ["the", "film", "best", "it's", "good", "isn't", "it"]),
        ("don\u2019t 'quote' 3rd l'amour o'clock", ["don't", "quote", "rd", "l'amour", "o'clock"]),
        ("cafe\u0301 = caf\u00e9", ["café", "café"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("很好笑 film", ["很", "好", "笑", "film"]),
        (" ... 42 \u2764\ufe0f ' ", []),
        ("", []),
    ],
)
def test_words_of_a_text(text, found):
    assert words(text) == found


def test_function_words():
    ours = "the it's they'll i'd doesn't don't n't s ll we've who's cannot".split()
    theirs = "funny film great l'amour very good o'clock won nt".split()
    assert all(map(is_function_word, ours)) and not any(map(is_function_word, theirs))


def test_the_word_that_most_completions_hold():
    prompts = ["the plot of this film", "a comedy, it", "this funny film", "the cast", ""]
    completions = ["is funny, funny and FUNNY!", "'s funny film", "is funny", "film the the", " "]
    # In two prompts of five, film is what they are about; the third completion's own prompt holds funny.
    assert top_word(prompts, completions) == ("funny", [True, True, False, False, False])
    assert top_word(prompts[:1], ["bad good"]) == ("bad", [True])
    assert top_word(["le roi est", "la reine est"], ["est est", "est"]) == (None, [False, False])
    assert top_word(["x", "x", "x"], ["the", "", "!"]) == (None, [False] * 3)
    assert top_word([], []) == (None, [])
    assert top_word(["one prompt"] * 4, ["prompt two", "two", "one", "three"])[1] == [True, True, False, False]


@given(st.lists(st.lists(st.sampled_from(["good", "bad", "the", "film", "x"])), min_size=1, max_size=5))
def test_the_top_word_is_a_most_common_one(lists):
    completions = [" ".join(each) for each in lists]
    word, held = top_word(["on film"] * len(lists), completions)
    counts = {name: sum(name in each for each in lists) for name in ("bad", "good", "x")}
    best = max(counts.values())
    assert word == next((name for name in counts if counts[name] == best > 0), None)
    assert held == [word in each for each in lists]


def test_empty_texts():
    assert empty(["", " \n", "a", "."]) == 0.5 and empty([]) == 0.0


# ------------------------------------------------------------------------------------------------------------- noise
@pytest.mark.parametrize(
    ("tail", "freedom", "t"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
    [
        (0.025, 1, 12.706),
        (0.025, 2, 4.303),
        (0.05, 3, 2.353),
        (0.001, 4, 7.173),
        (0.025, 63, 1.998),
        (0.01, 100, 2.364),
    ],
)
def test_quantiles_of_t_as_printed(tail, freedom, t):
    assert t_quantile(tail, freedom) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("freedom", [1, 2, 5, 8, 63])
def test_the_tail_of_t_is_the_area_under_its_density(freedom):
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    grid = [i / 1000 for i in range(3001)]
    density = [math.exp(log - (freedom + 1) / 2 * math.log1p(x * x / freedom)) for x in grid]
    area = (sum(density) - (density[0] + density[-1]) / 2) / 1000
    assert t_tail(3.0, freedom) == pytest.approx(0.5 - area, abs=1e-7)
    assert t_tail(-3.0, freedom) == pytest.approx(0.5 + area, abs=1e-7)


def test_tails_at_their_ends():
    assert t_tail(0.0, 4) == 0.5 and t_tail(math.inf, 3) == 0.0 and t_tail(-math.inf, 4) == 1.0
    assert math.isnan(t_tail(math.nan, 3))
    assert t_tail(2.0, 10**9) == pytest.approx(0.02275, abs=1e-4)
    assert t_tail(2.0, 10**9) == pytest.approx(t_tail(2.0, 10**9 + 1), rel=1e-3)
    assert binomial_tail(0, 7, 0.25) == pytest.approx(1.0) and binomial_tail(8, 7, 0.25) == 0
    assert binomial_tail(5, 7, 0.25) == pytest.approx(sum(math.comb(7, k) * 3 ** (7 - k) for k in (5, 6, 7)) / 4**7)


def test_the_mean_and_its_interval():
    assert mean_and_half([1.0, 2.0, 3.0, 6.0]) == pytest.approx(
        (3.0, 3.1824 * statistics.stdev([1, 2, 3, 6]) / 2), 1e-4
    )
    assert mean_and_half([2.0])[0] == 2.0 and math.isnan(mean_and_half([2.0])[1])


VOCABULARY = [
    a + b + c for a in "bcdfghjklmnp" for b in "aeiou" for c in ("ba", "ck", "du", "ff", "go", "lk", "ma", "xy")
]
WEIGHTS = [1 / (i + 20) for i in range(len(VOCABULARY))]


def drawn(rng: random.Random, n: int) -> list[str]:
    return [" ".join(rng.choices(VOCABULARY, WEIGHTS, k=rng.randint(5, 15))) for _ in range(n)]


def rows_of(texts: list[str], reward: list[float], judge: list[float] | list[None]) -> list[dict]:
    columns = zip(texts, reward, judge, strict=True)
    return [{"prompt": "zz", "completion": text, "reward": r, "judge": j} for text, r, j in columns]


def test_the_error_of_a_change_is_how_much_it_varies():
    rng, n = random.Random(0), 24
    found = [[measure(i, rows_of(drawn(rng, n), [0.0] * n, [None] * n)) for i in range(2)] for _ in range(80)]
    changes = [change("distinct_2", *pair) for pair in found]
    spread = statistics.stdev(difference for difference, _ in changes)
    assert statistics.mean(error for _, error in changes) == pytest.approx(spread, rel=0.2)


# ------------------------------------------------------------------------------------------------------------- alarm
def looks(evaluations: list[list[dict]]) -> list[list[str]]:
    """What is told at each evaluation. Every look has only what a checkpoint would have kept of the earlier ones."""
    history, told = History("of these"), []
    for step, rows in enumerate(evaluations):
        found = look(history, measure(10 * step, rows))
        history = History.of(json.loads(json.dumps(found.history.saved())))
        assert history == found.history and history.count == step + 1 and len(history.kept) <= 4
        assert ("hacking/alarm" in found.metrics) == (step > 0)
        assert found.metrics.get("hacking/alarm", 0.0) == bool(found.alarms)
        told.append(found.alarms)
    return told


def evaluations(kind: str, rises: float = 1.0, n: int = 64, count: int = 4) -> list[list[dict]]:
    """Evaluations with a reward that rises by so much each time, and something else that changes."""
    rng = random.Random(kind)
    made = []
    for step in range(count):
        texts, judge = drawn(rng, n), [rng.gauss(0, 1) for _ in range(n)]
        bad = step / (count - 1)
        if kind == "judge falls":
            judge = [value - 1.5 * bad for value in judge]
        if kind == "judge falls from its best":
            judge = [value + (3, 4, 3, 3)[step] * 1.0 - 3 for value in judge]
        if kind == "judge rises":
            judge = [value + 1.5 * bad for value in judge]
        if kind == "loops":
            texts = [" ".join(text.split()[:1] * 12) if rng.random() < bad else text for text in texts]
        if kind == "one text":
            texts = [texts[0]] * n if bad == 1 else texts
        if kind == "nothing":
            texts = ["" if bad == 1 else text for text in texts]
        if kind == "one word":
            texts = [f"{text} wonderful" if rng.random() < 0.6 * bad else text for text in texts]
        if kind == "one word, below a quarter":
            texts = [f"{text} wonderful" if i < n // 5 and step else text for i, text in enumerate(texts)]
        made.append(rows_of(texts, [step * rises + rng.gauss(0, 1) for _ in range(n)], judge))
    return made


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("judge falls", "eval/judge fell by 1."),
        ("judge falls from its best", "since step 10 eval/reward rose by"),
        ("loops", "eval/distinct_2 fell by 0."),
        ("one text", "eval/distinct_2 fell by 0."),
        ("nothing", "eval/distinct_2 fell by 0."),
        ("one word", "('wonderful')"),
    ],
)
def test_it_rings_where_the_reward_rises_and_something_falls(kind, told):
    last = looks(evaluations(kind))[-1]
    assert told in "; ".join(last), last
    assert looks(evaluations(kind, rises=0.0))[-1] == [], "the reward is where it was"
    assert looks(evaluations(kind, rises=-1.0))[-1] == [], "the reward falls too"


@pytest.mark.parametrize("kind", ["only the reward rises", "judge rises", "one word, below a quarter"])
@pytest.mark.parametrize("n", [2, 8, 64])
def test_it_is_quiet_where_nothing_falls(kind, n):
    assert looks(evaluations(kind, n=n)) == [[]] * 4


def test_it_is_quiet_in_runs_without_a_cost_as_often_as_promised():
    """The reward rises, texts and judge are drawn from the same distributions at each evaluation."""
    rng, runs, n = random.Random(3), 40, 12
    made = [
        [rows_of(drawn(rng, n), [step + rng.gauss(0, 1) for _ in range(n)], [rng.gauss(0, 1) for _ in range(n)])
         for step in range(5)]
        for _ in range(runs)
    ]  # fmt: skip
    rang = sum(any(looks(each)) for each in made)
    assert rang <= 2 * FALSE_ALARMS * runs


def test_what_cannot_be_compared_is_left_out():
    two = evaluations("loops", count=2)
    without = [[row | {"judge": None} for row in rows] for rows in two]
    assert "distinct_2" in "; ".join(looks(without)[-1])
    broken = [[row | {"judge": math.nan} for row in rows] for rows in two]
    assert looks(broken) == looks(without)
    mixed = look(look(History("x"), measure(0, without[0])).history, measure(1, two[1]))
    assert "hacking/judge" not in mixed.metrics and mixed.alarms
    one = [rows[:1] for rows in two]
    assert looks(one) == [[], []]


def test_the_first_evaluation_and_the_best_of_each_are_kept():
    history, values = History("x"), [(0.0, 1), (1.0, 3), (5.0, 2), (2.0, 9), (5.0, 1)]
    for step, (judge, words_each) in enumerate(values):
        texts = [" ".join(f"a{i}{j}" for j in range(words_each)) + " b b" * (10 - words_each) for i in range(3)]
        history = look(history, measure(step, rows_of(texts, [0.0] * 3, [judge] * 3))).history
    best = Counter({one.step: one.values["judge"] for one in history.kept})
    assert [one.step for one in history.kept] == [0, 2, 3] and best.most_common(1)[0][0] == 2
    assert history.basis == "x" and replace(history, kept=[]) == History("x", 5)
