"""What a completion is worth: a weighted sum of a reward model and plain Python functions."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rgrl.config import Config, RewardConfig
from rgrl.config.explain import short
from rgrl.errors import ConfigError
from rgrl.plugins import resolve
from rgrl.rewards.classifier import ClassifierReward, load_classifier
from rgrl.rewards.functions import (
    FunctionFailedError,
    RewardFunction,
    as_rewards,
    call_function,
    misnamed,
    parameters,
)
from rgrl.seeds import global_state, set_global_state
from rgrl.types import Prompts, SomePrompts

TRIAL = ("The answer is 42.", "")  # completions that each function is tried on; a policy may write an empty one


@dataclass
class Rewards:
    """Every term of the reward by name, with its weight."""

    model: ClassifierReward | None
    functions: dict[str, RewardFunction]
    weights: dict[str, float]
    time_limit: float = 0.0  # seconds for a call of a function; 0: none
    on_error: str = "stop"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of functions, by name
    columns: list[str] | None = None  # of the data, which functions may ask for by name; None: of each call's rows
    failures: list[tuple[str, str]] = field(default_factory=list)  # (name, what happened) of calls replaced by 0
    unrated: Counter[str] = field(default_factory=Counter)  # completions that a function gave None

    def score(self, prompts: Prompts, completions: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum r_B and each term, float32 on the CPU.

        A term is NaN where a function returned None: it gives no reward there, and the sum leaves it out. The sum is
        NaN where every term is. Raises `ConfigError` for a term that is not one finite number or None per completion,
        with the text at fault, and for a function that raises or takes too long, unless `on_error` is `zero`.
        """
        terms: dict[str, Tensor] = {}
        if self.model is not None:
            terms[self.model.name] = self.model.score(prompts, completions).cpu()
            check_finite(self.model.name, terms[self.model.name], prompts, completions)
        for name, function in self.functions.items():
            values = self._call(name, function, prompts, completions)
            r_B, rated_B = as_rewards(name, values, len(completions))
            check_finite(name, r_B, prompts, completions)
            terms[name] = r_B.masked_fill(~rated_B, math.nan)
            self.unrated[name] += int((~rated_B).sum())
        summands = [self.weights[name] * r_B.nan_to_num(nan=0.0) for name, r_B in terms.items()]
        rated_B = torch.stack([~r_B.isnan() for r_B in terms.values()]).any(0)
        return torch.stack(summands).sum(0).masked_fill(~rated_B, math.nan), terms

    def try_out(self, training: SomePrompts, evaluation: SomePrompts | None = None) -> list[str]:
        """Call each function once on two completions: a bug shows before a run begins, whatever `on_error` says.

        The columns of both data sets are from now on those that functions may name. The global random state is put
        back. Returns what to warn of. Raises `ConfigError`.
        """
        data = {"data.path": training} | ({} if evaluation is None else {"data.eval_path": evaluation})
        notes: list[str] = []
        columns = {setting: prompts.columns for setting, prompts in data.items()}
        self.columns = sorted(set().union(*columns.values()))
        for name, function in self.functions.items():
            own = self.settings.get(name, {})
            for setting, there in columns.items():
                try:
                    parameters(name, function, there, own)
                except ConfigError as error:
                    raise ConfigError(f"{error} (`{setting}`)") from error
            if (odd := misnamed(name, function, self.columns, own)) is not None:
                notes.append(
                    f"reward {name!r}: its parameter {odd!r} is given the rows; no column of the data has this name "
                    f"({', '.join(self.columns)}), so call it `rows` if that is meant"
                )
        if not self.functions:
            return notes
        two, state = training.take([0, min(1, len(training) - 1)]), global_state()
        trial = Rewards(None, self.functions, self.weights, self.time_limit, "stop", self.settings, self.columns)
        try:
            trial.score(two, list(TRIAL))
        except ConfigError as error:
            raise ConfigError(f"{error}; that was a trial on two completions, {TRIAL[0]!r} and an empty one") from error
        finally:
            set_global_state(state)
        return notes

    def take_cut(self) -> int:
        """How many texts the reward model was shown without the beginning of their prompt, since the last call."""
        if self.model is None:
            return 0
        cut, self.model.frame.cut = self.model.frame.cut, 0
        return cut

    def _call(self, name: str, function: RewardFunction, prompts: Prompts, completions: list[str]) -> Any:
        own = self.settings.get(name)
        try:
            return call_function(name, function, prompts, completions, self.time_limit, own, self.columns)
        except FunctionFailedError as failure:
            if self.on_error == "stop":
                raise ConfigError(f"reward {name!r} {failure}", on_one_rank=True) from failure.__cause__
            self.failures.append((name, str(failure)))
            return [0.0] * len(completions)


def check_finite(name: str, r_B: Tensor, prompts: Prompts, completions: list[str]) -> None:
    """Raise `ConfigError` unless `r_B` is one finite number a completion, with the text at fault."""
    if r_B.shape != (len(completions),):
        raise ConfigError(
            f"reward {name!r} returned shape {tuple(r_B.shape)} for {len(completions)} completions", on_one_rank=True
        )
    for value, prompt, completion in zip(r_B.tolist(), prompts.texts, completions, strict=True):
        if not math.isfinite(value):
            raise ConfigError(
                f"reward {name!r} is {value} for prompt {prompt!r} and completion {completion!r}", on_one_rank=True
            )


def load_functions(config: RewardConfig) -> Rewards:
    """The Python functions alone, which need no device. Raises `ConfigError` for what cannot be found or called."""
    c = config
    functions = {path.partition(":")[2] or path: resolve(path, "reward function") for path in c.functions}
    for name, function in functions.items():
        if not callable(function):
            raise ConfigError(f"reward function {name!r} cannot be called: it is {short(function)}")
    if len(functions) < len(c.functions) or c.name in functions:
        raise ConfigError("`reward.functions`: two rewards have the same name; rename one")
    if odd := [name for name in c.settings if name not in functions]:
        known = ", ".join(functions) or "none"
        raise ConfigError(
            f"`reward.settings.{odd[0]}`: no function of `reward.functions` has this name; known: {known}"
        )
    weights = {path.partition(":")[2] or path: weight for path, weight in c.functions.items()}
    return Rewards(None, functions, {**weights, c.name: c.weight}, c.time_limit, c.on_error, c.settings)


def load_rewards(
    config: Config, device: torch.device | str, rewards: Rewards | None = None, gradients: bool = False
) -> tuple[Rewards, ClassifierReward | None]:
    """The scorer and the guide; one set of weights where they are the same model.

    The scorer is `rewards` with its model, where the functions are loaded already. The guide is None where rollouts are
    unguided and the update does without its gradient. `gradients`: the objective needs one, whatever `gradient.weight`.
    """
    c, rewards = config.reward, rewards if rewards is not None else load_functions(config.reward)
    if c.path is not None:
        rewards.model = load_classifier(c.path, device, c.dtype, c.adapter, c.name, c.max_length, c.revision)
    guide = None
    g = config.gradient
    if config.guidance.kind != "none" or (g.of == "guide" and (gradients or g.weight > 0)):
        other, revision = config.guidance.path, config.guidance.revision
        same = other is None or (other == c.path and revision in (None, c.revision))
        guide = rewards.model
        if not same:
            guide = load_classifier(str(other), device, c.dtype, None, "guide", c.max_length, revision)
    return rewards, guide
