"""What a completion is worth: a weighted sum of a reward model and plain Python functions."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgrl.config import Config
from rgrl.errors import ConfigError
from rgrl.plugins import resolve
from rgrl.rewards.classifier import ClassifierReward, load_classifier
from rgrl.rewards.functions import FunctionFailedError, RewardFunction, as_rewards, call_function
from rgrl.types import Prompts


@dataclass
class Rewards:
    """Every term of the reward by name, with its weight."""

    model: ClassifierReward | None
    functions: dict[str, RewardFunction]
    weights: dict[str, float]
    time_limit: float = 0.0  # seconds for a call of a function; 0: none
    on_error: str = "stop"
    failures: list[tuple[str, str]] = field(default_factory=list)  # (name, what happened) of calls replaced by 0

    def score(self, prompts: Prompts, completions: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum r_B and each term, float32 on the CPU.

        Raises `ConfigError` for a term that is not one finite number per completion, with the text at fault, and for a
        function that raises or takes too long, unless `on_error` is `zero`.
        """
        terms: dict[str, Tensor] = {}
        if self.model is not None:
            terms[self.model.name] = self.model.score(prompts, completions).cpu()
        for name, function in self.functions.items():
            terms[name] = as_rewards(name, self._call(name, function, prompts, completions), len(completions))
        for name, r_B in terms.items():
            check_finite(name, r_B, prompts, completions)
        total_B = torch.stack([self.weights[name] * r_B for name, r_B in terms.items()]).sum(0)
        return total_B, terms

    def take_cut(self) -> int:
        """How many texts the reward model was shown without the beginning of their prompt, since the last call."""
        if self.model is None:
            return 0
        cut, self.model.frame.cut = self.model.frame.cut, 0
        return cut

    def _call(self, name: str, function: RewardFunction, prompts: Prompts, completions: list[str]) -> list[float]:
        try:
            return call_function(function, prompts, completions, self.time_limit)
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


def load_rewards(config: Config, device: torch.device | str) -> tuple[Rewards, ClassifierReward | None]:
    """The scorer and the guide; one set of weights where they are the same model.

    The guide is None where rollouts are unguided and the update does without its gradient.
    """
    c = config.reward
    functions = {path.partition(":")[2] or path: resolve(path, "reward function") for path in c.functions}
    for name, function in functions.items():
        if not callable(function):
            raise ConfigError(f"reward function {name!r} cannot be called: it is {function!r}")
    if len(functions) < len(c.functions) or c.name in functions:
        raise ConfigError("`reward.functions`: two rewards have the same name; rename one")
    weights = {path.partition(":")[2] or path: weight for path, weight in c.functions.items()}
    model = None
    if c.path is not None:
        model = load_classifier(c.path, device, c.dtype, c.adapter, c.name, c.max_length, c.revision)
    guide = None
    g = config.gradient
    if config.guidance.kind != "none" or (g.weight > 0 and g.of == "guide"):
        other, revision = config.guidance.path, config.guidance.revision
        same = other is None or (other == c.path and revision in (None, c.revision))
        guide = model if same else load_classifier(str(other), device, c.dtype, None, "guide", c.max_length, revision)
    return Rewards(model, functions, {**weights, c.name: c.weight}, c.time_limit, c.on_error), guide
