"""Verifiers of text: an exact answer, tags in their order, a regular expression."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from annotated_types import MinLen

from rgrl.config.explain import short
from rgrl.config.kinds import Flag, Maybe, Text
from rgrl.errors import ConfigError
from rgrl.rewards.verifiers.answers import Where, marked
from rgrl.rewards.verifiers.base import BadRowError, Job, Verifier, as_text, own_settings, shown


# ------------------------------------------------------------------------------------------------ exact
@own_settings
class ExactSettings:
    column: Text = "answer"
    """Column with the right answer: text, a number, or a list of texts of which each is right."""
    where: Where = "auto"
    """Where the completion's answer stands: `tags` (<answer>), `boxed`, `hashes` (####), `text` (all of it), or
    `auto`: the first of the marks that there is, else all of it."""
    case: Flag = False
    """Whether capital letters differ from small ones."""


def normalised(text: str, case: bool) -> str:
    """One form of a text: compatible characters as one (NFKC), single spaces, no punctuation around it."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    start, end = 0, len(text)
    while start < end and not _counts(text[start]):
        start += 1
    while start < end and not _counts(text[end - 1]):
        end -= 1
    text = text[start:end] or text
    return text if case else text.casefold()


def _counts(character: str) -> bool:
    return character in "+-%" or unicodedata.category(character)[0] not in "PZC"


def read_texts(row: Mapping[str, Any], settings: Any) -> list[str] | None:
    """The right answers of a row, normalised."""
    value = row.get(settings.column)
    if value is None:
        return None
    found = []
    for one in value if isinstance(value, list | tuple) else [value]:
        text = as_text(one, settings.column)
        part = marked(text) if isinstance(one, str) else None
        found.append(normalised(text if part is None else part, settings.case))
    if not found or not all(found):
        raise BadRowError(f"{settings.column!r} is {shown(value)}, which is no answer")
    return found


def score_exact(completion: str, expected: list[str], settings: Any) -> float:
    part = marked(completion, settings.where)
    if part is None:
        if settings.where != "auto":
            return 0.0
        part = completion
    if len(part) > 10 * max(map(len, expected)) + 1000:
        return 0.0
    return float(normalised(part, settings.case) in expected)


# ------------------------------------------------------------------------------------------------ tags
@own_settings
class TagsSettings:
    tags: Annotated[list[Text], MinLen(1)] = field(default_factory=lambda: ["think", "answer"])
    """Names of tags that a completion must hold once each, in this order, none within another, each with some text."""
    strict: Flag = True
    """Whether anything but white space may stand outside them: true forbids it."""
    partial: Flag = False
    """Pay the fraction of tags that are there once, closed and in order, instead of all or nothing."""

    def __post_init__(self) -> None:
        for tag in self.tags:
            if not re.fullmatch(r"[^<>/\s]+", tag):
                raise ConfigError(f"`tags.tags`: {short(tag)} is no name of a tag, such as think")
        if len(set(self.tags)) < len(self.tags):
            raise ConfigError("`tags.tags` names a tag twice")


def score_tags(completion: str, expected: Any, settings: Any) -> float:
    place, right, outside = 0, 0, ""
    for tag in settings.tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        start = completion.find(opening, place)
        end = completion.find(closing, max(start, 0))
        once = completion.count(opening) == 1 == completion.count(closing)
        if start < 0 or end < 0 or not once or not completion[start + len(opening) : end].strip():
            continue
        outside += completion[place:start].strip()
        place = end + len(closing)
        right += 1
    outside += completion[place:].strip()
    if settings.partial:
        return right / len(settings.tags)
    return float(right == len(settings.tags) and not (settings.strict and outside))


# ------------------------------------------------------------------------------------------------ pattern
@own_settings
class PatternSettings:
    pattern: Text = ""
    """Regular expression of Python's `re`, searched for in the completion; `(?s)` and the like begin it. Required."""
    whole: Flag = False
    """Whether it must match the whole completion."""
    column: Maybe[Text] = None
    """Column that its first group must equal, spaces around it aside. None: that it is found is enough."""

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ConfigError("`pattern.pattern` is required: a regular expression")
        try:
            found = re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"`pattern.pattern`: {short(self.pattern)} is no regular expression: {error}") from None
        if self.column is not None and not found.groups:
            raise ConfigError(f"`pattern.column` needs a group in `pattern.pattern`, such as ({self.pattern[:60]})")


def read_for_pattern(row: Mapping[str, Any], settings: Any) -> str | None:
    if settings.column is None:
        return ""
    value = row.get(settings.column)
    if value is None:
        return None
    return as_text(value, settings.column).strip()


def score_pattern(completion: str, expected: str, settings: Any) -> Job:
    whole, column = "whole" if settings.whole else "part", "" if settings.column is None else "group"
    return Job("pattern", (settings.pattern, completion, whole, column, expected))


EXACT = Verifier(ExactSettings, read_texts, score_exact, lambda settings: [settings.column])
TAGS = Verifier(TagsSettings, lambda row, settings: "", score_tags, lambda settings: [])
PATTERN = Verifier(
    PatternSettings,
    read_for_pattern,
    score_pattern,
    lambda settings: [settings.column] if settings.column is not None else [],
    seconds=1.0,
    job="pattern",
)
