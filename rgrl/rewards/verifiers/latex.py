r"""Answers in LaTeX, compared by math-verify in a process of its own (worker.py).

What it is given is bounded first: its length, its depth, the size of its numbers, and the commands that it may hold.
"""

import re
from collections.abc import Mapping
from typing import Any

from rgrl.config.kinds import Text
from rgrl.rewards.verifiers.answers import Where, marked
from rgrl.rewards.verifiers.base import BadRowError, Job, Verifier, as_text, own_settings, shown

LONGEST, DEEPEST, MOST_DIGITS = 500, 20, 100
# Those of final answers. Integrals, sums, limits and definitions of commands are not among them.
COMMANDS = frozenset(
    "frac dfrac tfrac cfrac sqrt pi theta alpha beta gamma delta lambda mu phi omega sigma epsilon infty cdot times "
    "div pm mp left right big Big bigg Bigg text textbf textit textrm mathrm mathbf mathit mathbb mathcal mbox "
    "operatorname boxed fbox displaystyle le leq leqslant lt ge geq geqslant gt ne neq in cup cap setminus "
    "emptyset varnothing subset subseteq begin end binom dbinom tbinom log ln lg exp sin cos tan cot sec csc arcsin "
    "arccos arctan sinh cosh tanh max min gcd lcm deg circ degree angle triangle overline overrightarrow vec hat bar "
    "lfloor rfloor lceil rceil lvert rvert vert langle rangle lbrace rbrace lbrack rbrack ldots dots cdots quad "
    "qquad mod bmod pmod to rightarrow approx equiv sim cong land lor mid perp parallel space".split()
)
ENVIRONMENTS = frozenset("matrix pmatrix bmatrix vmatrix smallmatrix array cases".split())
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_MATHS = re.compile(r"\$\$(.{1,500}?)\$\$|\$([^$\n]{1,500})\$|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]", re.DOTALL)
_DOLLARS = re.compile(r"^(?:\$\$?|\\\(|\\\[)|(?:\$\$?|\\\)|\\\])$")


@own_settings
class MathSettings:
    column: Text = "answer"
    """Column with the right answer in LaTeX, or a solution that marks it with \\boxed{} or ####."""
    where: Where = "auto"
    """Where the completion's answer stands: `tags` (<answer>), `boxed`, `hashes` (####), `text` (all of it), or
    `auto`: the first of the marks that there is, else its last formula between dollars, else its last line."""


def unreadable(text: str) -> str | None:
    """Why an expression is not compared, None where it is."""
    if not text:
        return "empty"
    if len(text) > LONGEST:
        return f"longer than {LONGEST} characters"
    depth = braces = 0
    for before, character in zip(f" {text}", text, strict=False):
        depth += (character in "{([") - (character in "})]")
        if before != "\\":
            braces += (character == "{") - (character == "}")
        if depth > DEEPEST:
            return "nested too deeply"
        if braces < 0:  # what follows would stand outside the box that it is compared in
            return "a brace that was not opened"
    if braces:
        return "a brace that is not closed"
    if re.search(rf"[0-9]{{{MOST_DIGITS + 1}}}", text):
        return f"a number of more than {MOST_DIGITS} digits"
    for name in _COMMAND.findall(text):
        if name not in COMMANDS:
            return f"\\{name} is no command that answers are compared with"
    for name in re.findall(r"\\begin\s*\{([^{}]*)\}", text):
        if name not in ENVIRONMENTS:
            return f"\\begin{{{name}}} is no environment that answers are compared with"
    return None


def expression(text: str, where: Where) -> str | None:
    """The answer of a text as an expression."""
    part = marked(text, where)
    if part is None and where == "auto":
        tail = text[-2000:]
        formulas = [next(filter(None, match.groups())) for match in _MATHS.finditer(tail)]
        part = formulas[-1] if formulas else tail.strip().rsplit("\n", 1)[-1]
    if part is None:
        return None
    part = part.strip()
    if not part.startswith("\\$"):
        part = _DOLLARS.sub("", part).strip()
    return part.rstrip(". ")


def read_latex(row: Mapping[str, Any], settings: Any) -> str | None:
    value = row.get(settings.column)
    if value is None:
        return None
    text = as_text(value, settings.column)
    found = expression(text, "auto" if marked(text) is not None else "text")
    why = unreadable(found or "")
    if why is not None:
        raise BadRowError(f"{settings.column!r} is {shown(value)}, which cannot be compared: {why}")
    return found


def score_latex(completion: str, expected: str, settings: Any) -> float | Job:
    found = expression(completion, settings.where)
    if found is None or unreadable(found) is not None:
        return 0.0
    if "".join(found.split()) == "".join(expected.split()):
        return 1.0
    return Job("math", (expected, found))


MATH = Verifier(MathSettings, read_latex, score_latex, lambda settings: [settings.column], seconds=5.0, job="math")
