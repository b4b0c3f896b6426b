"""Countdown: an expression that makes the target of all the numbers given. It is parsed here, in exact fractions."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any

from annotated_types import Ge, Le

from rgrl.config.kinds import Number, Text
from rgrl.rewards.verifiers.answers import Where, marked
from rgrl.rewards.verifiers.base import BadRowError, Verifier, own_settings, shown

LONGEST, DEEPEST, MOST_NUMBERS, LARGEST = 1000, 50, 100, 10**100
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_SIGNS = str.maketrans({"\u2212": "-", "\u00d7": "*", "\u00b7": "*", "\u2217": "*", "\u22c5": "*", "\u00f7": "/"})
_COMMANDS = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""), ("\\right", ""), ("$", ""))
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}


class NoExpressionError(ValueError):
    """Text that is no arithmetic, or divides by zero."""


def tokens_of(text: str) -> list[str]:
    """Whole numbers, + - * / and parentheses. Raises `NoExpressionError` for anything else, and for too much of it."""
    if len(text) > LONGEST:
        raise NoExpressionError("too long")
    text = text.translate(_SIGNS)
    for command, sign in _COMMANDS:
        text = text.replace(command, sign)
    text = _FRACTION.sub(r"((\1)/(\2))", text).replace("[", "(").replace("]", ")")
    if left := _TOKEN.sub("", text).strip():
        raise NoExpressionError(f"not arithmetic: {left[:20]}")
    if re.search(r"[0-9]\s+[0-9]", text) or re.search(r"\b0[0-9]", text):
        raise NoExpressionError("numbers side by side, or with a leading 0")
    return _TOKEN.findall(text)


def evaluate(tokens: list[str]) -> Fraction:
    """The value of an expression, exactly: two stacks and no recursion. Raises `NoExpressionError`."""
    values: list[Fraction] = []
    signs: list[str] = []

    def apply() -> None:
        sign = signs.pop()
        right = values.pop()
        if sign == "negate":
            values.append(-right)
            return
        left = values.pop()
        if sign == "/" and right == 0:
            raise NoExpressionError("division by 0")
        values.append(
            left + right
            if sign == "+"
            else left - right
            if sign == "-"
            else left * right
            if sign == "*"
            else left / right
        )

    expects_value = True
    for token in tokens:
        if expects_value and token == "(":
            signs.append(token)
            if signs.count("(") > DEEPEST:
                raise NoExpressionError("nested too deeply")
        elif expects_value and token == "-" and (not signs or signs[-1] == "("):
            signs.append("negate")
        elif expects_value and token.isdigit():
            values.append(Fraction(int(token)))
            expects_value = False
        elif not expects_value and token == ")":
            while signs and signs[-1] != "(":
                apply()
            if not signs:
                raise NoExpressionError("a parenthesis that was not opened")
            signs.pop()
        elif not expects_value and token in "+-*/":
            while signs and signs[-1] != "(" and _PRECEDENCE[signs[-1]] >= _PRECEDENCE[token]:
                apply()
            signs.append(token)
            expects_value = True
        else:
            raise NoExpressionError(f"{token} in the wrong place")
    if expects_value or "(" in signs:
        raise NoExpressionError("not finished")
    while signs:
        apply()
    return values[0]


# ------------------------------------------------------------------------------------------------ the verifier
@own_settings
class CountdownSettings:
    numbers: Text = "numbers"
    """Column with the numbers: a list of whole numbers."""
    target: Text = "target"
    """Column with what they should make."""
    where: Where = "auto"
    """Where the completion's expression stands: `tags` (<answer>), `boxed`, `hashes` (####), `text` (all of it), or
    `auto`: the first of the marks that there is, else the last line."""
    format_score: Annotated[Number, Ge(0), Le(1)] = 0.0
    """What arithmetic is worth that does not make the target, or not of these numbers. TinyZero, d1: 0.1."""


def read_countdown(row: Mapping[str, Any], settings: Any) -> tuple[list[int], Fraction] | None:
    numbers, target = row.get(settings.numbers), row.get(settings.target)
    if numbers is None or target is None:
        return None
    if not isinstance(numbers, list | tuple) or not 0 < len(numbers) <= MOST_NUMBERS:
        raise BadRowError(f"{settings.numbers!r} is {shown(numbers)}, which is no list of whole numbers")
    whole = [_whole(number, settings.numbers) for number in numbers]
    return whole, Fraction(_whole(target, settings.target))


def _whole(value: Any, column: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,100}\s*", value, re.ASCII):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
        raise BadRowError(f"{column!r} holds {shown(value)}, which is no whole number of at least 0")
    return value


def score_countdown(completion: str, expected: tuple[list[int], Fraction], settings: Any) -> float:
    part = marked(completion, settings.where)
    if part is None and settings.where == "auto":
        lines = completion.strip().rsplit("\n", 1)
        part = lines[-1]
    if part is None:
        return 0.0
    numbers, target = expected
    expression, _, right = part.partition("=")
    try:
        tokens = tokens_of(expression)
        if len(tokens) > 4 * MOST_NUMBERS or any(len(token) > 101 for token in tokens):
            return 0.0
        used = sorted(int(token) for token in tokens if token.isdigit())
        if used != sorted(numbers) and not settings.format_score:
            return 0.0
        value = evaluate(tokens)
        claimed = evaluate(tokens_of(right)) if right.strip() else value
    except NoExpressionError:
        return 0.0
    return 1.0 if used == sorted(numbers) and value == target == claimed else float(settings.format_score)


COUNTDOWN = Verifier(
    CountdownSettings, read_countdown, score_countdown, lambda settings: [settings.numbers, settings.target]
)
