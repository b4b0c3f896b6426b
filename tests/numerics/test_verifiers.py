"""Verifiers: right answers in every form, wrong ones, and text that is meant to break them."""

import os
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rgrl.errors import ConfigError
from rgrl.rewards.verifiers import VERIFIERS, load_verifier
from rgrl.rewards.verifiers.countdown import NoExpressionError, evaluate, tokens_of
from rgrl.rewards.verifiers.latex import unreadable
from rgrl.rewards.verifiers.numbers import answer_in, read_token
from rgrl.rewards.verifiers.process import WORKER
from rgrl.types import Prompts

PURE = [name for name, verifier in VERIFIERS.items() if not verifier.seconds]
NEEDED = {"length": {"most": 10}, "pattern": {"pattern": "a"}}


def score(kind, completion, row, **own):
    return load_verifier(kind, settings=own)([""], [completion], [row])[0]


# ------------------------------------------------------------------------------------------------------------ numbers
RIGHT = [
    ("it is 42", "42"),
    ("so 3 + 4 = 7.", "7"),
    ("#### 1,234", "Adding up. #### 1234"),
    ("#### 42\nand 3 more words", 42),
    ("#### Step 3: the sum\nis 42", 42),
    ("\\boxed{\\frac{1}{2}}", 0.5),
    ("\\boxed{-\\frac{1}{2}}", "-0.5"),
    ("\\boxed{1\\frac{1}{2}}", "3/2"),
    ("\\boxed{\\$18.90}", "\\$18.90"),
    ("\\boxed{42 \\text{ cm}}", 42),
    ("\\boxed{x = 42}", 42),
    ("\\boxed{1{,}000}", 1000),
    ("<answer>$1,234.50</answer>", "1234.5"),
    ("<answer>\\boxed{7}</answer> or 8", 7),
    ("<answer>42 apples</answer>", 42),
    ("<answer>5kg", 5),
    ("1 <answer>2</answer> <answer>3</answer>", 3),
    ("<answer>50%</answer>", "0.5"),
    ("<answer>50%</answer>", 50),
    ("\u22125", "-5"),
    ("the answer is \u22125", -5),
    ("x = - 5", -5),
    ("-$5", -5),
    ("- 5 apples", 5),
    ("\u0664\u0662", 42),
    ("**42**", 42),
    ("$5 million", 5_000_000),
    ("-1 1/2", -1.5),
    ("12,34,567", 1234567),
    ("0.1", 0.1),
    ("1" * 500, "1" * 500),
    ("1e400", 10**400),
    ("#### +5", 5),
    ("<answer>(-5)</answer>", -5),
    ("\\boxed{\\frac{3}{-4}}", "-3/4"),
    ("it is -2\u00bd", -2.5),  # a vulgar fraction
    ("<answer>\u00bc</answer>", 0.25),
    ("\\boxed{25\\text{ cm}^2}", 25),
    ("<answer>25 m\u00b2</answer>", 25),  # square metres
    ("<answer>60 km/h</answer>", 60),
    ("\\boxed{\\$5/hour}", 5),
    # Scripts that set no space before a number, and Chinese for ten thousand and kilometres.
    ("\u7b54\u6848\u662f42\u3002", 42),
    ("\u7b54\u6848\u662f-5", -5),
    ("\uc815\ub2f5\uc74042\uc785\ub2c8\ub2e4", 42),
    ("\u0647\u0648\u0664\u0662", 42),
    ("<answer>3.5\u4e07</answer>", 35000),
    ("<answer>5\u5343\u7c73</answer>", 5),
]
WRONG = [
    ("", "1"),
    ("no number", 0),
    ("10-5", "-5"),
    ("<answer>0.5%</answer>", "50%"),
    ("\\boxed{2x+3}", 3),
    ("\\boxed{3x}", 3),
    ("\\boxed{\\sqrt{3}}", 3),
    ("\\boxed{2\\pi}", 2),
    ("<answer>between 3 and 4</answer>", 4),
    ("<answer></answer> 42", 42),
    ("x2", 2),
    ("x^2", 2),
    ("2**3", 23),
    ("3,5", 5),
    ("1.2.3", 3),
    ("1/2/2020", 2020),
    ("7/0", 7),
    ("3 million", 3),
    ("1/3", "0.333"),
    ("1" * 499 + "2", "1" * 500),
    ("1e401", 10**400),
    ("<answer>2\u00bd</answer>", 2),
    ("<answer>5\u00b2</answer>", 5),
    ("it is 2^10", 2),
    ("\\boxed{10^{3}}", 10),
    ("<answer>-(5)</answer>", 5),
    ("<answer>5 pi</answer>", 5),
    ("\\boxed{5/x}", 5),
    ("\\boxed{5 x^2}", 5),
    ("<answer>5\u4e07</answer>", 5),
    ("<answer>5\u2460</answer>", 5),  # a digit in a circle
    ("1e999999999", 1),
]


@pytest.mark.parametrize(("completion", "answer"), RIGHT)
def test_a_right_number_is_right_however_it_is_written(completion, answer):
    assert score("numeric", completion, {"answer": answer}) == 1.0


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_a_wrong_number_is_wrong(completion, answer):
    assert score("numeric", completion, {"answer": answer}) == 0.0


def test_where_the_number_stands_and_how_near_it_must_be_can_be_set():
    text = "first 1, \\boxed{2} <answer>3</answer>\n#### 4"
    found = {where: answer_in(text, where).number for where in ("tags", "boxed", "hashes", "text", "auto")}
    assert found == {"tags": 3, "boxed": 2, "hashes": 4, "text": 4, "auto": 3}
    assert score("numeric", "0.334", {"right": "1/3"}, tolerance=0.01, column="right") == 1.0
    assert score("numeric", "0.334", {"right": "1/3"}, relative=0.001, column="right") == 0.0


@settings(deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(0, 6))
def test_decimals_are_read_exactly(units, places):
    digits = str(abs(units)).rjust(places + 1, "0")
    point = len(digits) - places
    text = f"{'-' if units < 0 else ''}{digits[:point]}{'.' if places else ''}{digits[point:]}"
    assert answer_in(f"the answer is {text}").number == Fraction(units, 10**places)
    grouped = f"{units:,}"
    assert answer_in(f"<answer>{grouped}</answer>").number == units
    assert read_token("1,23,4") is None


@pytest.mark.parametrize("answer", [[1], {"a": 1}, "foo", "", float("nan"), float("inf"), True, "1 or 2"])
def test_a_row_that_cannot_be_read_gives_no_reward(answer):
    assert score("numeric", "1", {"answer": answer}) is None
    for huge in (10**5000, Fraction(1, 10**5000), Decimal("1e9999"), Decimal("sNaN"), Decimal("Infinity")):
        assert score("numeric", "1", {"answer": huge}) is None


# --------------------------------------------------------------------------------------------- exact, tags, penalties
def test_exact_answers_are_compared_without_case_space_and_punctuation():
    for completion, answer in [
        ("Paris", "paris"),
        ("<answer> (B). </answer>", "B"),
        ("\\boxed{New  York}", "new york"),
        ("\uff22", "B"),
        ("the\ncat", ["dog", "The cat!"]),
        ("5", 5.0),
        ("true", True),
    ]:
        assert score("exact", completion, {"answer": answer}) == 1.0, completion
    assert score("exact", "B", {"answer": "b"}, case=True) == 0.0
    assert score("exact", "+1", {"answer": "-1"}) == 0.0
    assert score("exact", "<answer>A</answer>B", {"answer": "B"}) == 0.0
    assert score("exact", "B", {"answer": "B"}, where="tags") == 0.0
    for odd in ({"a": 1}, [], [None], float("nan"), 10**5000, " "):
        assert score("exact", "B", {"answer": odd}) is None


def test_tags_must_be_there_once_and_in_order():
    good = "<think>a</think>\n<answer>b</answer>"
    assert score("tags", good, {}) == 1.0
    assert score("tags", f"{good} more", {}) == 0.0 and score("tags", f"{good} more", {}, strict=False) == 1.0
    for bad in ("", good + good, "<answer>b</answer><think>a</think>", "<think>a<answer>b</answer></think>", good[:-1]):
        assert score("tags", bad, {}) == 0.0, bad
    assert score("tags", "<think> </think><answer>b</answer>", {}) == 0.0
    assert score("tags", "<answer>b</answer>", {}, partial=True) == 0.5
    assert score("tags", "<a>1</a>", {}, tags=["a"]) == 1.0


def test_penalties_are_between_minus_one_and_zero():
    found = [score("length", "w " * n, {}, least=2, most=4, slack=1) for n in range(8)]
    assert found == [-1.0, -0.5, 0.0, 0.0, 0.0, -0.5, -1.0, -1.0]
    assert score("length", "abcd", {}, most=3, unit="characters") == -1.0
    assert score("repetition", "a b c d e", {}) == 0.0 and score("repetition", "", {}) == 0.0
    assert score("repetition", "a a a a", {}, n=1) == -0.75
    assert score("repetition", "\u5929\u5929\u5929", {}, n=1, unit="characters") == pytest.approx(-2 / 3)


# ------------------------------------------------------------------------------------------------------------ puzzles
TASK = {"numbers": [3, 5, 7], "target": 22}


@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        ("<answer>3 * 5 + 7</answer>", 1.0),
        ("<answer>7 + 5 \u00d7 3 = 22</answer>", 1.0),
        ("\\boxed{7 + 5 \\times 3}", 1.0),
        ("I think\n(3*5)+7", 1.0),
        ("<answer>3 * 5 + 7 = 23</answer>", 0.1),
        ("<answer>3 + 5 + 7</answer>", 0.1),
        ("<answer>3 * 5 + 7 + 3 - 3</answer>", 0.1),
        ("<answer>15 + 7</answer>", 0.1),
        ("<answer>22</answer>", 0.1),
        ("<answer>3 ** 5 + 7</answer>", 0.0),
        ("<answer>3 * 5 + 07</answer>", 0.0),
        ("<answer>(3 * 5 + 7</answer>", 0.0),
        ("<answer>3 * 5 +</answer>", 0.0),
        ("<answer>7 / (5 - 5)</answer>", 0.0),
        ("<answer>__import__('os')</answer>", 0.0),
        ("<answer>9**9**9</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_countdown_pays_an_expression_of_all_the_numbers(completion, worth):
    assert score("countdown", completion, TASK, format_score=0.1) == worth
    assert score("countdown", completion, TASK) == float(worth == 1.0)


def trees(depth):
    leaf = st.integers(0, 50).map(str)
    return leaf if not depth else leaf | st.tuples(trees(depth - 1), st.sampled_from("+-*/"), trees(depth - 1))


def written(tree):
    return tree if isinstance(tree, str) else f"({written(tree[0])} {tree[1]} {written(tree[2])})"


def value(tree):
    if isinstance(tree, str):
        return Fraction(tree)
    a, b = value(tree[0]), value(tree[2])
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[tree[1]]()


@settings(deadline=None)
@given(trees(4))
def test_arithmetic_is_that_of_the_tree_it_was_written_from(tree):
    try:
        expected = value(tree)
    except ZeroDivisionError:
        with pytest.raises(NoExpressionError):
            evaluate(tokens_of(written(tree)))
    else:
        assert evaluate(tokens_of(written(tree))) == expected
    assert evaluate(tokens_of("2 - 3 * 4 / 6 - 1")) == -1


def test_countdown_cannot_read_odd_rows():
    for numbers in (None, [], "3 5 7", [1.5], [-1], [True], [10**200], ["x"], {"a": 1}, [None], 3):
        assert score("countdown", "3*5+7", TASK | {"numbers": numbers}) is None
    assert score("countdown", "3*5+7", {"numbers": ["3", 5.0, 7], "target": "22"}) == 1.0


GRID = {"puzzle": "4020320000020314", "solution": "4123324114322314"}


def test_sudoku_pays_a_grid_that_keeps_what_was_given():
    solved = GRID["solution"]
    spaced = "\n".join(" ".join(solved[i : i + 4]) for i in range(0, 16, 4))
    for text in (f"<answer>{solved}</answer>", f"<answer>\n{spaced}\n</answer>", f"so 12 cells: {spaced}", solved):
        assert score("sudoku", text, GRID) == 1.0, text
    swapped = solved.translate(str.maketrans("12", "21"))
    for text in (swapped, solved[:-1], solved + "1", "1" * 16, "", f"<answer>{solved[:15]}</answer>{solved}"):
        assert score("sudoku", text, GRID) == 0.0, text
    one_off = "42" + solved[2:]
    assert score("sudoku", one_off, GRID, partial=True) == pytest.approx(1 - 1 / GRID["puzzle"].count("0"))
    assert score("sudoku", swapped, GRID, partial=True) == 0.0, "what was given is not kept"
    assert score("sudoku", solved, {"puzzle": [[4, 0, 2, 0], [3, 2, 0, 0], [0, 0, 0, 2], [0, 3, 1, 4]]}) == 1.0
    assert score("sudoku", solved, {"puzzle": int("0020320000020314")}) == 1.0, "a number lost the 0s it began with"


def test_sudoku_of_nine_and_odd_rows():
    solved = "".join(str((3 * (r % 3) + r // 3 + c) % 9 + 1) for r in range(9) for c in range(9))
    assert score("sudoku", solved, {"puzzle": solved[:40] + "." * 41}) == 1.0
    odd = (
        [[10**5000] * 4] * 4,
        [*map(int, "1234341221434321"), None],
        [True] * 16,
        [1.5] * 16,
        ["x"] * 16,
        "\u0664" * 16,
    )
    for puzzle in ("", "1234", "5" + "0" * 15, "11" + "0" * 14, 1.5, True, {"a": 1}, *odd):
        assert score("sudoku", "1" * 16, {"puzzle": puzzle}) is None
    assert score("sudoku", "1" * 16, GRID | {"solution": "1" * 16}, partial=True) is None


# -------------------------------------------------------------------------------------------- whatever they are shown
ROWS = st.dictionaries(
    st.sampled_from(["answer", "numbers", "target", "puzzle", "solution"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("5") | st.just(10**4000),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=6,
    ),
)
PIECES = st.sampled_from(
    [
        "<answer>",
        "</answer>",
        "\\boxed{",
        "}",
        "####",
        "\\frac{",
        "(",
        "-",
        "1",
        "\u22121",
        "1,",
        "/",
        "%",
        "**",
        " ",
        "\n",
    ]
)


@pytest.mark.parametrize("kind", PURE)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=30)
@given(completion=st.text() | st.lists(PIECES, max_size=30).map("".join), row=ROWS)
def test_any_text_and_any_row_has_a_value_or_none(kind, completion, row):
    found = score(kind, completion, row, **NEEDED.get(kind, {}))
    assert found is None or -1.0 <= found <= 1.0


HOSTILE = [
    "(" * 10**6,
    "\\boxed{" * 10_000 + "5" + "}" * 10_000,
    "9" * 10**6,
    "9.9." * 10_000,
    "1/" * 20_000,
    "1 " * 20_000,
    "$" * 10**5 + "5",
    "\\frac{" * 20_000,
    "\\text{" * 20_000,
    "-" * 10**5 + "5",
    "<answer>" * 20_000,
    "####" * 20_000,
    "5" + " " * 10**5 + "-5",
    "9**9**9",
    "1e999999999",
]


@pytest.mark.parametrize("kind", PURE)
def test_hostile_text_takes_bounded_time(kind):
    row = {"answer": "1", "numbers": [1, 2, 3], "target": 6, **GRID}
    verifier, start = load_verifier(kind, settings=NEEDED.get(kind, {})), time.process_time()
    found = verifier([""] * len(HOSTILE), HOSTILE, [row] * len(HOSTILE))
    assert all(one is None or -1.0 <= one <= 1.0 for one in found)
    assert time.process_time() - start < 20, "a second or so; quadratic time would be minutes"


# --------------------------------------------------------------------------------------------- a process of their own
def test_a_pattern_that_hangs_is_ended_and_the_next_is_answered():
    pattern = load_verifier("pattern", settings={"pattern": "^(a+)+$"}, seconds=0.5)
    texts = ["aaa", "a" * 60 + "b", "b", "aa"]
    assert pattern([""] * 4, texts, [{}] * 4) == [1.0, None, 0.0, 1.0]
    grouped = {"pattern": "is (\\d+)", "column": "answer"}
    assert score("pattern", "it is 42", {"answer": 42}, **grouped) == 1.0
    assert score("pattern", "it is 43", {"answer": 42}, **grouped) == 0.0
    assert score("pattern", "it is 43", {"answer": [1]}, **grouped) is None


def test_a_worker_that_was_killed_is_started_again():
    pattern = load_verifier("pattern", settings={"pattern": "a"}, seconds=20)
    assert pattern([""], ["a"], [{}]) == [1.0]
    child = pattern.process.child
    os.kill(child.pid, 9)
    assert pattern([""] * 2, ["a", "b"], [{}] * 2) == [1.0, 0.0]
    assert pattern.process.child.pid != child.pid
    again = pattern.process.child
    pattern.process.close()
    assert again.poll() is not None, "it ends with its owner"


def test_latex_is_compared_and_never_evaluated(tmp_path):
    pytest.importorskip("math_verify")
    maths, mark = load_verifier("math", seconds=60), tmp_path / "mark"
    cases = [
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        ("so $x=5$.", "5", 1.0),
        ("\\boxed{2\\sqrt{3}}", "$\\sqrt{12}$", 1.0),
        ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", 1.0),
        ("<answer>11\\frac{1}{2}</answer>", "We get \\boxed{11.5}", 1.0),
        ("\\boxed{3}", "4", 0.0),
        ("", "1", 0.0),
        ("\\boxed{", "1", 0.0),
        ("\\boxed{\\input{/etc/passwd}}", "1", 0.0),
        (f"\\boxed{{__import__('os').system('touch {mark}')}}", "1", 0.0),
        ("\\boxed{3}", {"a": 1}, None),
        ("\\boxed{3}", "\\int x", None),
        ("\\boxed{3}", None, None),
    ]
    texts, rows = [text for text, _, _ in cases], [{"answer": answer} for _, answer, _ in cases]
    assert maths([""] * len(cases), texts, rows) == [worth for _, _, worth in cases]
    assert not mark.exists()
    maths.seconds = 1.0
    assert maths([""] * 2, ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{5}"], [{"answer": "5"}] * 2) == [None, 1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1" * 501,
        "{" * 21 + "}" * 21,
        "9" * 101,
        "\\def\\x{1}",
        "\\begin{document}",
        "\\sum_{i=1}^{9}",
        "{1",
        "1}, {2",
    ],
)
def test_latex_is_bounded_before_it_is_parsed(text):
    assert unreadable(text) is not None
    assert unreadable("\\frac{1}{2}") is None and unreadable("\\left\\{1\\right\\}") is None


@pytest.mark.slow
def test_sympy_reads_numbers_without_eval():
    """In a process of its own: what it takes from sympy, it takes for good."""
    pytest.importorskip("math_verify")
    code = f"""
import builtins, runpy
worker = runpy.run_path({str(WORKER)!r})
worker["prepare_math"]()
import sympy
import sympy.parsing.sympy_parser as parser
def caught(*arguments):
    raise SystemExit("evaluated text")
parser.eval = caught
assert worker["check_math"]("12", "\\\\frac{{24}}{{2}}") == 1.0
assert worker["check_math"]("x+1.5", "1.5+x") == 1.0
try:
    sympy.sympify("1+1")
except Exception as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=170)
    assert result.returncode == 0 and "never evaluated" in result.stdout, result.stderr[-2000:]


# ----------------------------------------------------------------------------------------- settings and rows at start
@pytest.mark.parametrize(
    ("kind", "own", "words"),
    [
        ("numeric", {"tolerant": 1}, ["tolerant", "numeric.tolerance"]),
        ("numeric", {"tolerance": "much"}, ["`numeric.tolerance` must be a number"]),
        ("numeric", {"tolerance": -1}, ["`numeric.tolerance`", "at least 0"]),
        ("exact", {"where": "there"}, ["`exact.where`", "one of"]),
        ("tags", {"tags": []}, ["`tags.tags`", "empty"]),
        ("tags", {"tags": ["a b"]}, ["`tags.tags`", "no name"]),
        ("pattern", {}, ["`pattern.pattern` is required"]),
        ("pattern", {"pattern": "("}, ["no regular expression"]),
        ("pattern", {"pattern": "a", "column": "answer"}, ["needs a group"]),
        ("length", {}, ["`length.most` or `length.least` is required"]),
        ("length", {"most": 1, "least": 2}, ["above"]),
        ("countdown", {"format_score": 2}, ["`countdown.format_score`", "[0, 1]"]),
    ],
)
def test_a_bad_setting_is_one_line(kind, own, words):
    with pytest.raises(ConfigError) as error:
        load_verifier(kind, settings=own)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_rows_are_read_when_a_run_starts():
    def data(*answers):
        return Prompts(["p"] * len(answers), [{"prompt": "p", "answer": answer} for answer in answers])

    numeric = load_verifier("numeric")
    assert numeric.check(data("1", None, 2.0), "data.path", 0.0) is None
    with pytest.raises(
        ConfigError, match=r"cannot read 1 of 3 rows of `data.path`, the first is row 1: 'answer' is 'x'"
    ):
        numeric.check(data("1", "x", "3"), "data.path", 0.3)
    assert "1 of 3" in numeric.check(data("1", "x", "3"), "data.path", 0.4)
    with pytest.raises(ConfigError, match=r"'answer' of `data.eval_path`, which is empty in all rows"):
        numeric.check(data(None), "data.eval_path", 1.0)
    with pytest.raises(ConfigError, match=r"'right' of `data.path`; it has answer, prompt"):
        load_verifier("numeric", settings={"column": "right"}).check(data("1"), "data.path", 0.0)
    with pytest.raises(ConfigError, match="above 0 seconds"):
        load_verifier("math", seconds=0)
