"""Environment variables that should be numbers: launchers', and those that libraries read as they are loaded."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rgrl.errors import ConfigError

_WHOLE = re.compile("-?[0-9]{1,9}")
# What launchers tell a process in numbers: (least, most).
_NUMBERS = {name: (1, 10**6) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
_NUMBERS |= {name: (0, 10**6) for name in ("RANK", "OMP_NUM_THREADS")}
_NUMBERS |= {"LOCAL_RANK": (-1, 10**6), "MASTER_PORT": (0, 65535)}


def check_numbers(environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` for a variable of the launcher that is not the number it should be."""
    for name, (least, most) in _NUMBERS.items():
        text = environ.get(name, "")
        if text and not (_WHOLE.fullmatch(text) and least <= int(text) <= most):
            raise ConfigError(
                f"the environment variable {name} must be a whole number from {least}, not {text[:60]!r}",
                on_one_rank=True,
            )
    rank, size = int(environ.get("RANK") or 0), int(environ.get("WORLD_SIZE") or 1)
    if rank >= size:
        raise ConfigError(f"the environment variable RANK ({rank}) must be below WORLD_SIZE ({size})", on_one_rank=True)


@contextmanager
def read_by_libraries() -> Iterator[None]:
    """Raise `ConfigError` where a library that is loaded in the body stumbles over an environment variable."""
    try:
        yield
    except ValueError as error:
        named = [name for name, value in os.environ.items() if value and repr(value) in str(error)]
        if not named:
            raise
        raise ConfigError(f"the environment variable {' or '.join(named)} cannot be read: {error}") from error
