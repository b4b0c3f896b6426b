"""Plain Python rewards: a user's code, called within a time limit, and what it returns checked."""

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rgrl.errors import ConfigError
from rgrl.rewards.limits import TimeUpError, time_limit
from rgrl.types import Prompts

# prompts, completions, rows of the data set -> one number a completion
RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]


class FunctionFailedError(Exception):
    """A function raised or took too long; the message says which."""


def call_function(function: RewardFunction, prompts: Prompts, completions: list[str], seconds: float) -> Any:
    """What the function returns, unchecked. Raises `FunctionFailedError`, after at most `seconds` (0: no limit)."""
    try:
        with time_limit(seconds):
            return function(prompts.texts, completions, prompts.rows)
    except TimeUpError:  # where the alarm happened to ring says nothing
        raise FunctionFailedError(f"did not return within `reward.time_limit` of {seconds:g} seconds") from None
    except Exception as error:  # a user's code may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        raise FunctionFailedError(problem) from error


def as_rewards(name: str, values: Any, count: int) -> Tensor:
    """What a function returned, as r_B, float32 on the CPU. Raises `ConfigError` for what is no such list."""
    try:
        return torch.as_tensor(values, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"reward {name!r} must return one number for each of {count} completions: {error}", on_one_rank=True
        ) from error
