"""The types of settings, and how each reads what a file or a command line says.

A file's plain scalars arrive as text (load.py), and are read as a number only where a number is meant: a folder called
2026_11_25 stays one. Limits stand beside the fields in schema.py, as in `Annotated[Whole, Ge(1)]`.
"""

import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AllowInfNan, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from rgrl.config.explain import explain
from rgrl.errors import ConfigError

SECTIONS: dict[str, type] = {}  # every section by its name

T = TypeVar("T")
_DIGITS = "[0-9](?:_?[0-9])*"
_WHOLE = re.compile(rf"[-+]?(0|(?!0){_DIGITS})")
_NUMBER = re.compile(rf"[-+]?({_DIGITS}(\.({_DIGITS})?)?|\.{_DIGITS})(e[-+]?{_DIGITS})?", re.IGNORECASE)
_ODD = re.compile(r"[-+]?(0[0-9_]+|0[xob].*|[0-9_]+(:[0-9_.]+)+)", re.IGNORECASE)
_INFINITE = re.compile(r"([-+]?)\.?inf(inity)?", re.IGNORECASE)
_REVISION = re.compile(r"[A-Za-z0-9_][-+.\w/@]*")
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Plain(str):
    """A scalar of a file or a command line without quotes: where a setting may be anything, it may be a number."""


class Null(Plain):
    """An unquoted `null`, `~` or nothing: no value where a setting is optional, and elsewhere a text like any other."""


@dataclass_transform(field_specifiers=(field,))
def section(name: str, listed: bool = True) -> Callable[[type[T]], type[T]]:
    """A dataclass whose values pydantic checks when it is made; a bad one raises `ConfigError`.

    `name` is what its keys begin with. `listed`: it is a section of the settings; otherwise a value within one.
    """

    def make(cls: type[T]) -> type[T]:
        made: Any = dataclass(cls)
        made.__pydantic_config__ = ConfigDict(extra="forbid")

        @functools.wraps(made.__init__)
        def init(self: T, *args: Any, **values: Any) -> None:
            try:
                _validator(made).validate_python(ArgsKwargs(args, values), self_instance=self)
            except ValidationError as error:
                raise ConfigError(explain(error, name, SECTIONS)) from None

        made.__init__ = init
        if name and listed:
            SECTIONS[name] = made
        return made

    return make


@functools.cache
def _validator(cls: type) -> Any:
    """Made when it is first needed: that takes longer than the import of all settings."""
    return TypeAdapter(cls).validator


def read_whole(value: Any) -> int:
    """A whole number, or text that is one in plain decimal. Raises `ValueError` with what was expected."""
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()) and len(value) < 1000:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(_expected("a whole number", value))


def read_number(value: Any) -> float:
    """A number, or text that is one in plain decimal; infinity too. Raises `ValueError` with what was expected."""
    if isinstance(value, str) and not _ODD.fullmatch(text := value.strip()):
        if found := _INFINITE.fullmatch(text):
            return -math.inf if found[1] == "-" else math.inf
        if _NUMBER.fullmatch(text):
            return float(text)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        try:
            return float(value)
        except OverflowError:
            return math.copysign(math.inf, value)
    raise ValueError(_expected("a number", value))


def _expected(what: str, value: Any) -> str:
    odd = isinstance(value, str) and _ODD.fullmatch(value.strip())
    return f"{what} in plain decimal (no leading 0, no other base)" if odd else what


def read_flag(value: Any) -> bool:
    """True or false, or one of YAML's words for them. Raises `ValueError` with what was expected."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _FLAGS:
        return _FLAGS[value.lower()]
    raise ValueError("true or false")


def read_text(value: Any) -> str:
    """Text as it is. Raises `ValueError` with what was expected."""
    if not isinstance(value, str):
        raise ValueError("text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("text in UTF-8") from None
    if "\0" in value:
        raise ValueError("text without NUL characters")
    return str(value)  # also where it is a subclass


def read_anything(value: Any) -> Any:
    """What a file says as YAML means it, or plain data: true, false, numbers, text, null, lists and mappings of these.

    Quoted text stays text. Raises `ValueError` with what was expected.
    """
    if isinstance(value, Null):
        return None
    if isinstance(value, Plain):
        if value.lower() in _FLAGS:
            return _FLAGS[value.lower()]
        if _WHOLE.fullmatch(value):
            return read_whole(value)
        if _NUMBER.fullmatch(value) or _INFINITE.fullmatch(value):
            return read_number(value)
        if _ODD.fullmatch(value) or value.lower() == ".nan":
            raise ValueError("a number in plain decimal (no leading 0, no other base), or text in quotes")
    if isinstance(value, str):
        return read_text(value)
    if isinstance(value, list | tuple):
        return [read_anything(one) for one in value]
    if isinstance(value, dict):
        return {read_text(key): read_anything(one) for key, one in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ValueError("true or false, a number, text, null, or a list or mapping of these")


def read_wanted(value: Any) -> Any:
    """What a column must hold: as `read_anything`, without YAML's other words for true and false. `no` is Norwegian.

    Raises `ValueError` with what was expected.
    """
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, Plain) and one.lower() in _FLAGS and one.lower() not in ("true", "false"):
            raise ValueError("true or false, or text in quotes")
    return read_anything(value)


def read_path(value: Any) -> str:
    """A path, or text that can be one on any file system. Raises `ValueError` with what was expected."""
    text = read_text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError("a path of at most 255 bytes a name and 4,000 in all")
    return text


def read_revision(value: Any) -> str:
    """The name of a branch or tag, or a commit, as git allows them. Raises `ValueError` with what was expected."""
    text = read_text(value)
    if not _REVISION.fullmatch(text) or ".." in text or "//" in text or text.endswith("/") or len(text) > 255:
        raise ValueError("a branch, tag or commit of the Hub")
    return text


Whole = Annotated[int, BeforeValidator(read_whole)]
Infinite = Annotated[float, BeforeValidator(read_number)]  # a number, or infinity
Number = Annotated[Infinite, AllowInfNan(False)]
Flag = Annotated[bool, BeforeValidator(read_flag)]
Text = Annotated[str, BeforeValidator(read_text)]
Anything = Annotated[Any, BeforeValidator(read_anything)]
Wanted = Annotated[Any, BeforeValidator(read_wanted)]
PathText = Annotated[str, BeforeValidator(read_path)]
Revision = Annotated[str, BeforeValidator(read_revision)]
# A setting that may have no value: `Maybe[Text]`.
Maybe = Annotated[T | None, BeforeValidator(lambda value: None if isinstance(value, Null) else value)]
