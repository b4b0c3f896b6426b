"""Resolve names in settings: built-in entries, or a user's own code by dotted path."""

import importlib
from typing import Any

from rgrl.errors import ConfigError


def resolve(path: str, what: str, known: dict[str, Any] | None = None) -> Any:
    """The entry of `known` called `path`, or the attribute at `package.module:attribute`. Raises `ConfigError`."""
    if known and path in known:
        return known[path]
    names = (
        f"; known: {', '.join(known)}, or package.module:attribute" if known else "; expected package.module:attribute"
    )
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ConfigError(f"unknown {what} {path!r}{names}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what} {path!r} cannot be imported: {error}") from error
