"""What a completion is worth: a weighted sum of reward models and plain Python functions."""

import importlib
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rgrl.config import Config, ConfigError
from rgrl.rewards.classifier import ClassifierReward, GuideSession, load_classifier
from rgrl.rewards.limits import TimeUpError, time_limit
from rgrl.types import Prompts

__all__ = ["ClassifierReward", "GuideSession", "Rewards", "load_classifier", "load_rewards", "resolve"]

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]


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


@dataclass
class Rewards:
    """Every part of the reward by name, with its weight."""

    model: ClassifierReward | None
    functions: dict[str, RewardFunction]
    weights: dict[str, float]
    time_limit: float = 0.0  # seconds for a call of a function; 0: none
    on_error: str = "stop"
    failures: list[tuple[str, str]] = field(default_factory=list)  # (name, what happened) of calls that counted as 0

    def score(self, prompts: Prompts, completions: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum r_B and each part, float32 on the CPU.

        Raises `ConfigError` for a part that is not one finite number per completion, with the text at fault, and for a
        function that raises or takes too long, unless `on_error` is `zero`.
        """
        parts: dict[str, Tensor] = {}
        if self.model is not None:
            parts[self.model.name] = self.model.score(prompts, completions).cpu()
        for name, function in self.functions.items():
            values = self._call(name, function, prompts, completions)
            try:
                parts[name] = torch.as_tensor(values, dtype=torch.float32).cpu()
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"reward {name!r} must return one number for each of {len(completions)} completions: {error}",
                    on_one_rank=True,
                ) from error
        for name, r_B in parts.items():
            if r_B.shape != (len(completions),):
                raise ConfigError(
                    f"reward {name!r} returned shape {tuple(r_B.shape)} for {len(completions)} completions",
                    on_one_rank=True,
                )
            for value, prompt, completion in zip(r_B.tolist(), prompts.texts, completions, strict=True):
                if not math.isfinite(value):
                    raise ConfigError(
                        f"reward {name!r} is {value} for prompt {prompt!r} and completion {completion!r}",
                        on_one_rank=True,
                    )
        total_B = torch.stack([self.weights[name] * r_B for name, r_B in parts.items()]).sum(0)
        return total_B, parts

    def _call(self, name: str, function: RewardFunction, prompts: Prompts, completions: list[str]) -> list[float]:
        try:
            with time_limit(self.time_limit):
                return function(prompts.texts, completions, prompts.rows)
        except TimeUpError:
            problem = f"did not return within `reward.time_limit` of {self.time_limit:g} seconds"
            cause = None  # where the alarm happened to ring says nothing
        except Exception as error:  # it is somebody's code: it may raise anything
            place = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            cause = error
        if self.on_error == "stop":
            raise ConfigError(f"reward {name!r} {problem}", on_one_rank=True) from cause
        self.failures.append((name, problem))
        return [0.0] * len(completions)


def load_rewards(config: Config, device: torch.device | str) -> tuple[Rewards, ClassifierReward | None]:
    """The scorer and the guide (None for unguided rollouts); one set of weights where they are the same model."""
    c = config.reward
    functions = {path.partition(":")[2] or path: resolve(path, "reward function") for path in c.functions}
    for name, function in functions.items():
        if not callable(function):
            raise ConfigError(f"reward function {name!r} cannot be called: it is {function!r}")
    if len(functions) < len(c.functions) or c.name in functions:
        raise ConfigError("`reward.functions`: two rewards have the same name; rename one")
    weights = {path.partition(":")[2] or path: weight for path, weight in c.functions.items()}
    model = load_classifier(c.path, device, c.dtype, c.adapter, c.name) if c.path else None
    guide = None
    if config.guidance.kind != "none":
        other = config.guidance.path
        same = other is None or other == c.path
        guide = model if same else load_classifier(str(other), device, c.dtype, None, "guide")
    return Rewards(model, functions, {**weights, c.name: c.weight}, c.time_limit, c.on_error), guide
