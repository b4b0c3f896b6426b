"""What a completion is worth: a weighted sum of a reward model, verifiers and plain Python functions."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rgrl.config import Config, RewardConfig
from rgrl.config.explain import short
from rgrl.config.schema import PartConfig
from rgrl.errors import ConfigError
from rgrl.plugins import UserCodeError, resolve
from rgrl.rewards.classifier import ClassifierReward, load_classifier
from rgrl.rewards.functions import (
    RewardFunction,
    as_rewards,
    call_function,
    misnamed,
    parameters,
)
from rgrl.rewards.shaping import Shape, check_shapes, normalised, paid, weighted_sum
from rgrl.rewards.verifiers import VERIFIERS, Verification, load_verifier
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
    shapes: dict[str, Shape] = field(default_factory=dict)  # of the parts that are clipped, normalised or conditional
    limits: dict[str, float] = field(default_factory=dict)  # time limits of functions that have their own
    max_bad: float = 0.0  # fraction of rows that a verifier may fail to read

    def score(self, prompts: Prompts, completions: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum r_B and each term as it is paid (`shaping.paid`), float32 on the CPU.

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
        terms = paid(terms, self.shapes)
        return weighted_sum(terms, self.weights), terms

    def for_advantages(self, total_B: Tensor, terms: dict[str, Tensor], G: int) -> Tensor:
        """The sum that completions of a group of G are compared by: `total_B`, or with normalised terms in it."""
        chosen = {name for name, shape in self.shapes.items() if shape.normalise and name in terms}
        if not chosen:
            return total_B
        compared = {name: normalised(r_B, G) if name in chosen else r_B for name, r_B in terms.items()}
        return weighted_sum(compared, self.weights)

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
            if isinstance(function, Verification):
                notes += filter(None, (function.check(p, setting, self.max_bad) for setting, p in data.items()))
                continue
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
        trial = replace(self, model=None, on_error="stop", failures=[], unrated=Counter(), shapes={})
        try:
            trial.score(two, list(TRIAL))
        except ConfigError as error:
            raise ConfigError(f"{error}; that was a trial on two completions, {TRIAL[0]!r} and an empty one") from error
        finally:
            set_global_state(state)
        return notes

    @property
    def penalties(self) -> set[str]:
        """Verifiers that are never above 0."""
        return {n for n, f in self.functions.items() if isinstance(f, Verification) and not f.verifier.paid}

    def take_cut(self) -> int:
        """How many texts the reward model was shown without the beginning of their prompt, since the last call."""
        if self.model is None:
            return 0
        cut, self.model.frame.cut = self.model.frame.cut, 0
        return cut

    def _call(self, name: str, function: RewardFunction, prompts: Prompts, completions: list[str]) -> Any:
        if isinstance(function, Verification) and function.verifier.seconds:
            return function(prompts.texts, completions, prompts.rows)  # limits each completion's time itself
        own, seconds = self.settings.get(name), self.limits.get(name, self.time_limit)
        try:
            return call_function(name, function, prompts, completions, seconds, own, self.columns)
        except UserCodeError as failure:
            if self.on_error == "stop":
                raise ConfigError(str(failure), on_one_rank=True) from failure.__cause__
            self.failures.append((name, failure.reason))
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
    """The Python functions and verifiers, which need no device. Raises `ConfigError` for what cannot be found or
    called."""
    c, rewards = config, Rewards(None, {}, {config.name: config.weight}, config.time_limit, config.on_error)
    parts = {key: part if isinstance(part, PartConfig) else PartConfig(part) for key, part in c.functions.items()}
    names = {key: name_of(key, part) for key, part in parts.items()}
    taken = Counter([*names.values(), c.name])
    if twice := [name for name, times in taken.items() if times > 1]:
        raise ConfigError(f"`reward.functions`: two rewards have the same name {twice[0]!r}: give one another `name`")
    if odd := [name for name in c.settings if name not in names.values()]:
        known = ", ".join(names.values()) or "none"
        raise ConfigError(
            f"`reward.settings.{odd[0]}`: no function of `reward.functions` has this name; known: {known}"
        )
    for key, part in parts.items():
        path, name = part.function or key, names[key]
        settings = c.settings.get(name, {}) | part.settings
        if both := sorted(c.settings.get(name, {}).keys() & part.settings.keys()):
            raise ConfigError(f"reward {name!r}: its setting {both[0]!r} is also in `reward.settings`; keep one")
        rewards.weights[name] = part.weight
        if part.time_limit is not None:
            rewards.limits[name] = part.time_limit
        if path in VERIFIERS:
            rewards.functions[name] = load_verifier(path, name, settings, part.time_limit)
        else:
            rewards.functions[name] = resolve(path, "reward function", dict(VERIFIERS))
            rewards.settings[name] = settings
        if not callable(rewards.functions[name]):
            raise ConfigError(f"reward function {name!r} cannot be called: it is {short(rewards.functions[name])}")
        rewards.shapes[name] = shape_of(part)
    rewards.shapes[c.name], rewards.max_bad = shape_of(c), c.max_bad
    if c.path is None and rewards.shapes.pop(c.name) != Shape():
        raise ConfigError("`reward.clip`, `normalise` and `only_if` shape the model of `reward.path`, which is not set")
    check_shapes(rewards.shapes, [*rewards.functions, *([c.name] if c.path is not None else [])], rewards.penalties)
    return rewards


def name_of(key: str, part: PartConfig) -> str:
    """What a function of the reward is called in metrics and tables. Raises `ConfigError`."""
    name = part.name or (key if part.function else key.partition(":")[2] or key)
    if not re.fullmatch(r"[^/\s]+", name):
        raise ConfigError(f"`reward.functions`: {short(name)} is no name for metrics: no spaces, no slash")
    return name


def shape_of(part: PartConfig | RewardConfig) -> Shape:
    """How the settings of a part shape it."""
    return Shape((part.clip[0], part.clip[1]) if part.clip is not None else None, part.normalise, part.only_if)


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
