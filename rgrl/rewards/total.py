"""The reward of a completion: a weighted sum of terms, which are a reward model, verifiers and Python functions.

Each term may be clipped, made conditional on another, or normalised within a group of completions. These depend on one
completion or on one group, and on fixed settings. A group is always on one process, so neither the number of processes
nor a resumed run changes a number.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rgrl.algo.advantages import zero_spread
from rgrl.config import Config, RewardConfig
from rgrl.config.explain import short
from rgrl.config.schema import PartConfig
from rgrl.errors import ConfigError
from rgrl.plugins import UserCodeError, resolve
from rgrl.rewards.checkpoint import load_classifier
from rgrl.rewards.classifier import ClassifierReward
from rgrl.rewards.functions import RewardFunction, as_rewards, call_function, misnamed, parameters
from rgrl.rewards.verifiers import VERIFIERS, Verification, load_verifier
from rgrl.seeds import global_state, set_global_state
from rgrl.types import Prompts, SomePrompts

TRIAL = ("The answer is 42.", "")  # the completions of the dry run; a policy may write an empty one


@dataclass(frozen=True)
class Shape:
    """How one term of the reward is shaped."""

    clip: tuple[float, float] | None = None
    normalise: bool = False
    only_if: str | None = None


@dataclass(frozen=True)
class RewardCounts:
    """What calls of `Rewards.score` report besides rewards, on this process. `+` adds them up."""

    failed: Counter[str] = field(default_factory=Counter)  # calls of a function that failed and gave 0, by name
    unrated: Counter[str] = field(default_factory=Counter)  # completions that a function gave None, by name
    truncated: int = 0  # texts whose prompt lost its beginning to the reward model's length limit
    problems: dict[str, str] = field(default_factory=dict)  # how each function failed first

    def __add__(self, other: "RewardCounts") -> "RewardCounts":
        return RewardCounts(
            self.failed + other.failed,
            self.unrated + other.unrated,
            self.truncated + other.truncated,
            other.problems | self.problems,
        )

    def warnings(self) -> list[str]:
        """One sentence for each function that failed."""
        return [
            f"reward {name!r} {how}; its completions got 0 (reward.on_error)" for name, how in self.problems.items()
        ]


@dataclass(frozen=True)
class RewardResult:
    """The rewards of B completions, float32 on the CPU. NaN is no reward."""

    total_B: Tensor  # the weighted sum; NaN where every term is
    terms: dict[str, Tensor]  # each shaped term, unweighted; NaN where its function returned None
    counts: RewardCounts = field(default_factory=RewardCounts)


@dataclass
class Rewards:
    """The terms of the reward by name, each with its weight."""

    model: ClassifierReward | None
    functions: dict[str, RewardFunction]
    weights: dict[str, float]
    time_limit: float = 0.0  # seconds for a call of a function; 0: none
    on_error: str = "stop"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of functions, by name
    columns: list[str] | None = None  # of the data, which functions may ask for by name; None: of each call's rows
    shapes: dict[str, Shape] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)  # time limits of single functions, by name
    max_bad: float = 0.0  # fraction of rows that a verifier may fail to read

    def score(self, prompts: Prompts, completions: list[str]) -> RewardResult:
        """The weighted sum of the shaped terms, which leaves out a term where its function returned None.

        Raises `ConfigError` for a term that is not one finite number or None per completion, with the text at fault,
        and for a function that raises or takes too long, unless `on_error` is `zero`.
        """
        terms: dict[str, Tensor] = {}
        unrated, problems, truncated = Counter[str](), dict[str, str](), 0
        if self.model is not None:
            scores = self.model.score(prompts, completions)
            terms[self.model.name], truncated = scores.reward_B.cpu(), scores.truncated
            check_finite(self.model.name, terms[self.model.name], prompts, completions)
        for name, function in self.functions.items():
            try:
                values = self._call(name, function, prompts, completions)
            except UserCodeError as failure:
                if self.on_error == "stop":
                    raise ConfigError(str(failure), on_one_rank=True) from failure.__cause__
                problems[name], values = failure.reason, [0.0] * len(completions)
            r_B, rated_B = as_rewards(name, values, len(completions))
            check_finite(name, r_B, prompts, completions)
            terms[name] = r_B.masked_fill(~rated_B, math.nan)
            unrated[name] = int((~rated_B).sum())
        terms = shape_terms(terms, self.shapes)
        counts = RewardCounts(Counter(problems.keys()), unrated, truncated, problems)
        return RewardResult(weighted_sum(terms, self.weights), terms, counts)

    def _call(self, name: str, function: RewardFunction, prompts: Prompts, completions: list[str]) -> Any:
        if isinstance(function, Verification) and function.verifier.seconds:
            return function(prompts.texts, completions, prompts.rows)  # limits each completion's time itself
        settings, seconds = self.settings.get(name), self.limits.get(name, self.time_limit)
        return call_function(name, function, prompts, completions, seconds, settings, self.columns)

    def for_advantages(self, result: RewardResult, G: int) -> Tensor:
        """The sum by which completions of a group of G are compared: `total_B`, or with normalised terms in it."""
        chosen = {name for name, shape in self.shapes.items() if shape.normalise and name in result.terms}
        if not chosen:
            return result.total_B
        compared = {name: normalised(r_B, G) if name in chosen else r_B for name, r_B in result.terms.items()}
        return weighted_sum(compared, self.weights)

    @property
    def penalties(self) -> set[str]:
        """Verifiers that are never above 0."""
        return {n for n, f in self.functions.items() if isinstance(f, Verification) and not f.verifier.positive}

    def dry_run(self, training: SomePrompts, evaluation: SomePrompts | None = None) -> list[str]:
        """Call each function once on two completions: a bug shows before a run begins, whatever `on_error` is.

        From then on functions may name the columns of both data sets. The global random state is put back. Returns
        warnings. Raises `ConfigError`.
        """
        data = {"data.path": training} | ({} if evaluation is None else {"data.eval_path": evaluation})
        warnings: list[str] = []
        columns = {setting: prompts.columns for setting, prompts in data.items()}
        self.columns = sorted(set().union(*columns.values()))
        for name, function in self.functions.items():
            if isinstance(function, Verification):
                warnings += filter(None, (function.check(p, setting, self.max_bad) for setting, p in data.items()))
                continue
            settings = self.settings.get(name, {})
            for setting, known in columns.items():
                try:
                    parameters(name, function, known, settings)
                except ConfigError as error:
                    raise ConfigError(f"{error} (`{setting}`)") from error
            if (odd := misnamed(name, function, self.columns, settings)) is not None:
                warnings.append(
                    f"reward {name!r}: its parameter {odd!r} gets the rows; no column of the data has this name "
                    f"({', '.join(self.columns)}), so call it `rows` if the rows are meant"
                )
        if not self.functions:
            return warnings
        two, state = training.take([0, min(1, len(training) - 1)]), global_state()
        try:
            replace(self, model=None, on_error="stop", shapes={}).score(two, list(TRIAL))
        except ConfigError as error:
            raise ConfigError(f"{error}; in a dry run on two completions, {TRIAL[0]!r} and an empty one") from error
        finally:
            set_global_state(state)
        return warnings


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


# ----------------------------------------------------------------------------------------------------------- shape
def shape_terms(terms: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Each term r_B clipped, and 0 where the shaped term that its `only_if` names is not above 0.

    Where that one is NaN (no reward), the condition is unknown, and the term is NaN too. `shapes` have no cycles.
    """
    found: dict[str, Tensor] = {}

    def shaped(name: str) -> Tensor:
        if name not in found:
            shape, r_B = shapes.get(name, Shape()), terms[name]
            if shape.clip is not None:
                r_B = r_B.clamp(*shape.clip)
            if shape.only_if is not None:
                other_B = shaped(shape.only_if)
                unknown_B = other_B.isnan() | r_B.isnan()
                r_B = torch.where(other_B > 0, r_B, torch.zeros_like(r_B)).masked_fill(unknown_B, math.nan)
            found[name] = r_B
        return found[name]

    return {name: shaped(name) for name in terms}


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum r_B of the terms times their weights; NaN terms are left out, and it is NaN where all of them are.

    Terms of weight 0 do not count, so what only they rate is NaN too, unless no term has another weight. Raises
    `ConfigError` for a sum that float32 cannot hold.
    """
    counted = {name: r_B for name, r_B in terms.items() if weights[name]} or terms
    summands = [weights[name] * r_B.nan_to_num(nan=0.0) for name, r_B in counted.items()]
    rated_B = torch.stack([~r_B.isnan() for r_B in counted.values()]).any(0)
    total_B = torch.stack(summands).sum(0)
    if not total_B.isfinite().all():
        used = ", ".join(f"{name} {weights[name]:g}" for name in counted)
        raise ConfigError(f"the sum of rewards is too large for float32; their weights are {used}", on_one_rank=True)
    return total_B.masked_fill(~rated_B, math.nan)


def normalised(r_B: Tensor, G: int) -> Tensor:
    """A term in standard deviations of its group from the group's mean: GDPO, arXiv 2601.05242.

    Over the completions that have a reward (others stay NaN). 0 in a group whose values are all equal.
    """
    result_B = r_B.clone()
    for group_G, same in zip(result_B.view(-1, G), zero_spread(r_B, G).tolist(), strict=True):
        rated_G = ~group_G.isnan()
        r_N = group_G[rated_G].double()
        z_N = torch.zeros_like(r_N) if same else (r_N - r_N.mean()) / r_N.std()
        group_G[rated_G] = z_N.to(group_G.dtype)
    return result_B


def check_shapes(shapes: Mapping[str, Shape], names: Iterable[str], penalties: Iterable[str]) -> None:
    """Raise `ConfigError` for an `only_if` of an unknown term, in a circle, or of a penalty, which is never above 0."""
    known, penalties = list(names), list(penalties)
    for name, shape in shapes.items():
        other, path = shape.only_if, [name]
        if other is not None and other not in known:
            listed = ", ".join(known) or "none"
            raise ConfigError(
                f"reward {name!r}: no part of the reward is called {other!r} (`only_if`); known: {listed}"
            )
        if other in penalties:
            raise ConfigError(f"reward {name!r}: `only_if: {other}` would never hold, as a penalty is not above 0")
        while other is not None:
            if other in path:
                raise ConfigError(f"reward {name!r}: `only_if` goes in a circle: {' -> '.join([*path, other])}")
            path.append(other)
            other = shapes[other].only_if if other in shapes else None


# --------------------------------------------------------------------------------------------------------- loading
def load_functions(config: RewardConfig) -> Rewards:
    """The functions and verifiers, which need no device. Raises `ConfigError` for any that is not found or callable."""
    c, rewards = config, Rewards(None, {}, {config.name: config.weight}, config.time_limit, config.on_error)
    parts = {key: part if isinstance(part, PartConfig) else PartConfig(part) for key, part in c.functions.items()}
    names = {key: name_of(key, part) for key, part in parts.items()}
    uses = Counter([*names.values(), c.name])
    if twice := [name for name, count in uses.items() if count > 1]:
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
    """The name of a function's term in metrics and tables. Raises `ConfigError`."""
    name = part.name or (key if part.function else key.partition(":")[2] or key)
    if not re.fullmatch(r"[^/\s]+", name):
        raise ConfigError(f"`reward.functions`: {short(name)} is no name for metrics: no spaces, no slash")
    return name


def shape_of(part: PartConfig | RewardConfig) -> Shape:
    """The shape that the settings of a term describe."""
    return Shape((part.clip[0], part.clip[1]) if part.clip is not None else None, part.normalise, part.only_if)


def load_rewards(
    config: Config, device: torch.device | str, rewards: Rewards | None = None
) -> tuple[Rewards, ClassifierReward | None]:
    """The scorer and the guide; one set of weights where they are the same model.

    The scorer is `rewards` with its model, if the functions are loaded already. The guide is None where rollouts are
    unguided and the update does without its gradient.
    """
    c, rewards = config.reward, rewards if rewards is not None else load_functions(config.reward)
    if c.path is not None:
        rewards.model = load_classifier(c.path, device, c.dtype, c.adapter, c.name, c.max_length, c.revision)
    path, revision = config.guidance.path, config.guidance.revision
    if config.guidance.kind == "none" and not (config.gradient.of == "guide" and config.gradient.weight > 0):
        return rewards, None
    if path is None or (path == c.path and revision in (None, c.revision)):
        return rewards, rewards.model
    return rewards, load_classifier(path, device, c.dtype, None, "guide", c.max_length, revision)
