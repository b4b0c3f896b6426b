"""Numeric answers: the number that a text gives as its answer, exactly, as a fraction."""

import math
import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge

from rgrl.config.kinds import Number, Text
from rgrl.rewards.verifiers.answers import Where, in_box, in_tags, marked
from rgrl.rewards.verifiers.base import BadRowError, Verifier, own_settings, shown

MOST_DIGITS = 1000  # of a number, exponent written out; a longer one is not read
LONGEST_TAIL = 20_000  # characters in which the last number of a text is looked for
_MINUS = "-\u2212\ufe63\uff0d"
_SPACES = "\u00a0\u2009\u202f"  # that may stand between groups of three digits
_TOKEN = re.compile(rf"(?:[0-9]|(?<!\.)\.(?=[0-9]))[0-9.,'{_SPACES}]*(?:[eE][-+]?[0-9]+(?![0-9.]))?")
_PLAIN = re.compile(
    rf"(?P<whole>[0-9]{{1,3}}(?:(?P<sep>[,'{_SPACES}])[0-9]{{3}})(?:(?P=sep)[0-9]{{3}})*|"
    r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]*)(?:\.(?P<part>[0-9]*))?(?:[eE](?P<power>[-+]?[0-9]+))?"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*([-0-9.,]{1,300})\s*\}\s*\{\s*([-0-9.,]{1,300})\s*\}")
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*([0-9])\s*([0-9])(?![0-9])")
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_PERCENT = re.compile(r"\s?(?:%|per ?cent(?:age)?\b)")
# Chinese numerals that may follow digits, but for the one that begins kilograms and kilometres.
_KILO = re.compile("\u5343[\u514b\u7c73\u74e6\u5361]")
_SCALE = re.compile(
    rf"\s(hundred|thousand|million|billion|trillion)\b|(?!{_KILO.pattern})([\u767e\u5343\u4e07\u842c\u4ebf\u5104]{{1,2}})",
    re.IGNORECASE,
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"\u767e": 10**2, "\u5343": 10**3, "\u4e07": 10**4, "\u842c": 10**4, "\u4ebf": 10**8, "\u5104": 10**8}
# A unit may have an exponent or a slash: cm^2, m^{3}, km/h, 5/hour.
_RAISED_UNIT = re.compile(r"(?<![A-Za-z])([A-Za-z]{2,20}|m|s)\s{0,3}\^\s?(?:[1-9]|\{\s?[1-9]\s?\})(?![0-9])")
_PER_UNIT = re.compile(
    r"(?:^|(?<![A-Za-z])(?:[A-Za-z]{2,20}|[mglL]))\s?/\s?(?!pi|sqrt)(?:[A-Za-z]{2,20}|[hsmglL])(?![A-Za-z])"
)
_FACTOR = re.compile(r"[abceiknxyz](?![A-Za-z])|\s*(?:pi|sqrt|squared|cubed|dozen)(?![A-Za-z])")  # after a number
_SYMBOLS = "^*/+\\_{}<>|\u221a\u03c0()[]\u00d7\u00f7\u00b7"  # beside a number, they make it a part of a formula
_EQUALS = re.compile(r"=|\u2248|\\approx")


class Value(NamedTuple):
    """A number in a text, and where it stands; `number` is None where it cannot be read."""

    number: Fraction | None
    percent: bool
    start: int
    end: int


def _digits() -> dict[int, str]:
    """What stands for another character, by code point: decimal digits of all scripts, and forms of - / %."""
    other = {ord(c): "-" for c in _MINUS[1:]} | {0x2044: "/", 0x2215: "/", 0xFF0F: "/", 0xFF05: "%", 0xFF0E: "."}
    every = (chr(i) for i in range(128, 0x1FC00))
    return other | {ord(c): str(unicodedata.decimal(c)) for c in every if unicodedata.decimal(c, None) is not None}


def _compatible(kind: str) -> dict[str, str]:
    """Characters that Unicode calls a fraction, or a superscript, of digits -> those digits, as 1/2 or 2."""
    found = {}
    for c in map(chr, range(128, 0x2190)):
        form, _, codes = unicodedata.decomposition(c).partition(" ")
        text = "".join(chr(int(code, 16)) for code in codes.split()).replace("\u2044", "/")
        if form == kind and text[-1:].isdecimal():
            found[c] = text
    return found


_TRANSLATED = _digits()
_FRACTIONS, _SUPERSCRIPTS = _compatible("<fraction>"), _compatible("<super>")
_VULGAR, _RAISED = re.compile(f"[{''.join(_FRACTIONS)}]"), re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")


def plain(text: str) -> str:
    """A text with its numbers as ASCII has them, and the LaTeX around them taken off."""
    if not text.isascii():
        text = text.translate(_TRANSLATED)
        text = _VULGAR.sub(lambda found: f"{_space(found)}{_FRACTIONS[found[0]]} ", text)
        text = _RAISED.sub(lambda found: "^" + "".join(_SUPERSCRIPTS[c] for c in found[0]), text)
    if "\\" in text or "{" in text:
        text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", "\u2009")
        for command in ("\\left", "\\right", "^\\circ", "^{\\circ}", "\\(", "\\)", "\\[", "\\]", "\\;", "\\ "):
            text = text.replace(command, " ")
        text = text.replace("\\$", "$").replace("\\%", "%")
        text = _WORDS.sub(r" \1 ", text)
        for pattern in (_FRACTION, _SHORT_FRACTION):
            text = pattern.sub(_as_slash, text)
    return text.replace("**", " ").replace("\u00b0", " ")


def _as_slash(found: re.Match[str]) -> str:
    return f"{_space(found)}{found[1]}/{found[2]} "


def _space(found: re.Match[str]) -> str:
    """What keeps a fraction apart from the whole number before it."""
    return " " if found.start() and found.string[found.start() - 1].isdigit() else ""


def read_token(token: str) -> Fraction | None:
    """The value of digits with separators, None for what is no number written out properly (3,5 and 1.2.3)."""
    token = token.rstrip(f".,'{_SPACES}")
    found = _PLAIN.fullmatch(token)
    if found is None or not (found["whole"] or found["part"]):
        return None
    digits = re.sub(r"[^0-9]", "", found["whole"])
    part, power = found["part"] or "", found["power"] or "0"
    if len(power) > 6 or len(digits) + len(part) + abs(int(power)) > MOST_DIGITS:
        return None
    return Fraction(int((digits + part) or "0")) * Fraction(10) ** (int(power) - len(part))


def numbers_in(text: str, listed: bool = True) -> list[Value]:
    """The numbers of a plain text (see `plain`) in their order. `listed`: a dash that begins a line is a bullet."""
    found: list[Value] = []
    joined = False  # the last one is a fraction already
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        end -= len(match[0]) - len(match[0].rstrip(f".,'{_SPACES}"))
        before = text[start - 1] if start else " "
        last = found[-1] if found else None
        between = text[last.end : start].replace(" ", "") if last is not None else ""
        if last is not None and between in ("^", "^{"):
            found[-1] = last._replace(number=None, end=end)  # a power is not read
            continue
        if _joins(before) or before in "_^" or text[max(0, start - 2) : start] in ("^{", "_{"):
            continue  # a part of a name, an index or an exponent
        number = read_token(match[0])
        after = text[end : end + 1].isnumeric() and not _SCALE.match(text, end) and not _KILO.match(text, end)
        if before.isnumeric() or after:  # a numeral of another kind
            number = None
        if last is not None and between in ("/", "/-") and not last.percent:
            whole = found[-2] if len(found) > 1 and text[found[-2].end : last.start].strip(" ") == "" else None
            ratio = None
            if not joined and last.number is not None and number:
                ratio = last.number / (number if between == "/" else -number)
            if ratio is not None and whole is not None and whole.number is not None and 0 < ratio < 1:
                found.pop()  # a mixed number such as 1 1/2
                ratio = whole.number - ratio if _negative(text, whole.start, listed) else whole.number + ratio
                last = whole
            found[-1] = Value(ratio, False, last.start, end)
            joined = True
            continue
        joined = False
        if number is not None and _negative(text, start, listed):
            number = -number
        percent = _PERCENT.match(text, end)
        if percent is None and (scale := _SCALE.match(text, end)) is not None:
            words = [scale[1].lower()] if scale[1] else list(scale[2])
            number = None if number is None else number * math.prod(_SCALES[word] for word in words)
            end = scale.end()
        found.append(Value(number, percent is not None, start, percent.end() if percent else end))
    return found


def _negative(text: str, start: int, listed: bool) -> bool:
    """Whether a minus stands before the number at `start`, which is a sign and no subtraction, range or bullet."""
    i = start - 1
    while i >= 0 and unicodedata.category(text[i]) == "Sc":
        i -= 1
    spaced = i
    while spaced >= 0 and text[spaced] == " ":
        spaced -= 1
    if spaced < 0 or text[spaced] != "-":
        return False
    attached = spaced == i
    j = spaced - 1
    while j >= 0 and text[j] in " \t":
        j -= 1
    if j < 0 or text[j] == "\n":
        return attached or not listed
    if text[j] == "-":
        return False
    if attached and j < spaced - 1:
        return True  # "is -5"
    return not (_joins(text[j]) or text[j] in ")]}%.")


def _joins(character: str) -> bool:
    """Whether a digit after this character is a part of its word. Scripts without small letters often set no space."""
    return character.isalnum() and unicodedata.category(character) not in ("Lo", "Lm")


def answer_in(text: str, where: Where = "auto") -> Value | None:
    """The number that a text gives as its answer: the one in what is marked, or else the last of the text.

    What is marked must be one number, with words and units at the most, after its last equals sign. None where there is
    no number, or none that can be read.
    """
    part = marked(text, where)
    if part is None or where == "text":
        # Of a long text the end; what is cut in two there is taken for the end of a name.
        tail = text if len(text) <= LONGEST_TAIL else f"x{text[-LONGEST_TAIL:]}"
        found = numbers_in(plain(tail)) if where in ("auto", "text") else []
        return found[-1] if found and found[-1].number is not None else None
    part = plain(part[-10_000:])
    cut = [match.end() for match in _EQUALS.finditer(part)]
    part = part[cut[-1] :] if cut else part
    found = numbers_in(part, listed=False)
    if where == "hashes" or (where == "auto" and in_tags(text) is None and in_box(text) is None):
        found = found[:1]  # of a line, where a remark may follow
        part = part[: found[0].end] if found else part
    if len(found) != 1 or found[0].number is None:
        return None
    rest = part[: found[0].start], _PER_UNIT.sub(" ", _RAISED_UNIT.sub(r"\1", part[found[0].end :]))
    if rest[0].strip(" ($") == "+":
        rest = "", rest[1]
    elif re.search(r"-[ $]*\(", rest[0]):  # the sign of a parenthesis: -(5)
        return None
    formula = any(c in _SYMBOLS for side in rest for c in side.strip(" ()$"))
    return None if formula or _FACTOR.match(rest[1]) or re.search("[0-9]", rest[0] + rest[1]) else found[0]


# ------------------------------------------------------------------------------------------------ the verifier
@own_settings
class NumericSettings:
    column: Text = "answer"
    """Column with the right number, as a number or a text; of a text what is marked as in a completion."""
    where: Where = "auto"
    """Where the completion's answer stands: `tags` (<answer>), `boxed`, `hashes` (####), `text` (its last number), or
    `auto`: the first of these that there is."""
    tolerance: Annotated[Number, Ge(0)] = 0.0
    """Largest difference that is right."""
    relative: Annotated[Number, Ge(0)] = 0.0
    """The same as a fraction of the right number."""


def read_number_of(row: Mapping[str, Any], settings: Any) -> Value | None:
    value = row.get(settings.column)
    if value is None:
        return None
    if isinstance(value, str):
        found = answer_in(value) if marked(value) is not None else _alone(value)
        if found is None:
            raise BadRowError(f"{settings.column!r} is {shown(value)}, which is no number")
        return found
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | Fraction):
        raise BadRowError(f"{settings.column!r} is {shown(value)}, which is no number")
    if not _bounded(value):
        raise BadRowError(f"{settings.column!r} is no finite number of at most {MOST_DIGITS} digits")
    return Value(Fraction(repr(value)) if isinstance(value, float) else Fraction(value), False, 0, 0)


def _bounded(value: int | float | Decimal | Fraction) -> bool:
    """Whether a number is finite and not too long to be compared exactly."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Decimal):
        return value.is_finite() and abs(value.adjusted()) <= MOST_DIGITS
    return max(value.numerator.bit_length(), value.denominator.bit_length()) <= 3 * MOST_DIGITS


def _alone(text: str) -> Value | None:
    """The number that a text is, with a unit at the most."""
    return answer_in(f"<answer>{text}</answer>")


def score_number(completion: str, expected: Value, settings: Any) -> float:
    found = answer_in(completion, settings.where)
    if found is None or found.number is None or expected.number is None:
        return 0.0
    within = max(Fraction(settings.tolerance), Fraction(settings.relative) * abs(expected.number))
    given = [found.number]
    if found.percent != expected.percent:  # 50 % is 50 to some, and 0.5 to others
        given.append(found.number / 100 if found.percent else found.number * 100)
    return float(any(abs(number - expected.number) <= within for number in given))


NUMERIC = Verifier(NumericSettings, read_number_of, score_number, lambda settings: [settings.column])
