"""A user's Python rewards: how they are called, and what they may return.

A function with a parameter `completions` is called by name, as TRL's are: `exact(completions, answer, **kwargs)` gets
what it names of `prompts`, `completions`, `rows` and the columns of the data, each a list; with `**kwargs` all of them.
One with other names, `exact(p, c, r)`, gets prompts, completions and rows by position. It may be `async def`. All
arguments are copies, B entries each, a prompt standing G times in a row.

None means no reward from this function: the weighted sum leaves it out for this completion. A completion without any
reward has an advantage of 0, and its group is compared without it.
"""

import asyncio
import copy
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from itertools import islice
from typing import Any

import numpy
import torch
from torch import Tensor

from rgrl.errors import ConfigError
from rgrl.plugins import call_user_code
from rgrl.types import Prompts

# prompts, completions, rows of the data set -> one number a completion, or None for no reward; or by name
RewardFunction = Callable[..., Any]
GIVEN = ("prompts", "completions", "rows")
_NAMELESS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def call_function(
    name: str,
    function: RewardFunction,
    prompts: Prompts,
    completions: list[str],
    seconds: float,
    settings: Mapping[str, Any] | None = None,
    columns: Sequence[str] | None = None,
) -> Any:
    """What the function returns, unchecked: plain, detached, a copy.

    `columns` are those of the data (None: of these rows). Raises `UserCodeError` if it fails or takes longer than
    `seconds` (0: no limit), and `ConfigError` for one that cannot be called so.
    """
    settings = settings or {}
    columns = columns if columns is not None else sorted({name for row in prompts.rows for name in row})
    by_position, by_name = parameters(name, function, columns, settings)

    def value(key: str) -> Any:
        if key in GIVEN:
            known = (list(prompts.texts), list(completions), [copy.deepcopy(row) for row in prompts.rows])
            return known[GIVEN.index(key)]
        if key in settings:
            return copy.deepcopy(settings[key])
        if key in columns:
            return [copy.deepcopy(row.get(key)) for row in prompts.rows]
        return copy.deepcopy(dict(settings))

    args, named = [value(key) for key in by_position], {key: value(key) for key in by_name}

    def call() -> Any:
        result = function(*args, **named)
        return _plain(asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result, len(completions))

    return call_user_code(f"reward {name!r}", call, seconds)


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def _plain(values: Any, count: int) -> Any:
    """A copy of what was returned, without gradient or any of the function's code in it."""
    if isinstance(values, Tensor):
        return values.detach().cpu().clone()
    if hasattr(values, "__array__") and not hasattr(values, "items"):
        return numpy.array(values)
    if isinstance(values, str | bytes | Mapping | Set) or not hasattr(type(values), "__iter__"):
        return values
    most = None if hasattr(values, "__len__") else count + 1  # a generator may have no end
    return [x.item() if isinstance(x, Tensor) and x.ndim == 0 else x for x in islice(values, most)]


def as_rewards(name: str, values: Any, count: int) -> tuple[Tensor, Tensor]:
    """What a function returned, as r_B, float32 on the CPU, 0 where it was None, and where it was not (bool B).

    Raises `ConfigError` for anything else than such a list. The number of values is not checked here.
    """
    expected = f"reward {name!r} must return one number, or None, for each of {count} completions"
    if isinstance(values, str | bytes | Mapping | Set):
        raise ConfigError(f"{expected}, in their order, not a {type(values).__name__}", on_one_rank=True)
    rated: list[bool] = []
    if isinstance(values, list):
        rated = [value is not None for value in values]
        values = [0.0 if value is None else value for value in values]
    try:
        r_B = torch.as_tensor(values)
        if r_B.is_complex():
            raise TypeError("complex numbers")
        r_B = r_B.to(torch.float32, copy=True).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"{expected}: {error}", on_one_rank=True) from error
    return r_B, torch.tensor(rated, dtype=torch.bool) if rated else torch.ones(r_B.shape, dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------ parameters
def parameters(
    reward: str, function: RewardFunction, columns: Sequence[str], settings: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """What a function gets by position and by name: of `GIVEN`, its settings, and the data's columns.

    It goes by name where it has a parameter `completions`, else by position. A parameter `settings` gets all of them.
    Raises `ConfigError` for a function that fits neither.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have none
        return list(GIVEN), list(settings)
    named = [p for p in signature.parameters.values() if p.kind not in _NAMELESS]
    names, takes_any = [p.name for p in named], any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if odd := [name for name in settings if name in GIVEN or not (takes_any or name in names)]:
        taken = ", ".join(name for name in names if name not in GIVEN) or "none"
        raise ConfigError(f"reward {reward!r} has no setting {odd[0]!r}; of its parameters can be set: {taken}")
    positional = _by_position(signature, names, settings)
    takes_more = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    if positional is not None and ("completions" not in names or (takes_more and "rows" not in names)):
        return positional
    known = {*GIVEN, *settings, *columns, "settings"}
    if "completions" not in names and not takes_any:
        raise ConfigError(
            f"reward {reward!r} takes {signature}: expected prompts, completions and rows by position, or "
            "`completions`, and columns of the data, by name"
        )
    if lacking := [p.name for p in named if p.default is p.empty and p.name not in known]:
        if positional is not None and not takes_any and names[:2] == list(GIVEN[:2]) and lacking == names[2:3]:
            return positional
        raise ConfigError(
            f"reward {reward!r} takes {lacking[0]!r}, which is neither a column of the data "
            f"({', '.join(columns) or 'none'}) nor one of its settings"
        )
    first = [p.name for p in named if p.kind is p.POSITIONAL_ONLY and p.name in known]
    rest = dict.fromkeys((*GIVEN, *columns, *settings, *names)) if takes_any else names
    return first, [name for name in rest if name in known and name not in first]


def _by_position(
    signature: inspect.Signature, names: list[str], settings: Mapping[str, Any]
) -> tuple[list[str], list[str]] | None:
    """How a function is called with `GIVEN` by position, None if it cannot be."""
    more = [*settings, *(["settings"] if "settings" in names[3:] and "settings" not in settings else [])]
    try:
        signature.bind(*GIVEN, **dict.fromkeys(more))
    except TypeError:
        return None
    return list(GIVEN), more


def misnamed(reward: str, function: RewardFunction, columns: Sequence[str], settings: Mapping[str, Any]) -> str | None:
    """A third parameter that gets the rows though it has another name, and may have been meant for a column."""
    by_position, _ = parameters(reward, function, columns, settings)
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    found = by_position == list(GIVEN) and names[:2] == list(GIVEN[:2]) and len(names) > 2
    return names[2] if found and names[2] != "rows" and not names[2].startswith("_") else None
