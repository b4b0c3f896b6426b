"""Evaluators: what a run is measured by.

To add one, write a class like `HeldOut` (held_out.py) and append it to what `make_evaluators` returns in
`rgrl/trainer.py`. Its own prompts need the chat template (`prompts.formatted(policy.format_prompt)`), its metrics a
line in `rgrl/metrics.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rgrl.config import Config, RolloutConfig
from rgrl.models import Policy
from rgrl.rewards import RewardCounts
from rgrl.rollout import generate
from rgrl.rollout.guidance import Guidance
from rgrl.seeds import generator
from rgrl.types import Prompts, Rollout

__all__ = ["Evaluation", "Evaluator", "Generate", "generate_with", "noise_of", "sampler"]


@dataclass(frozen=True)
class Evaluation:
    """Metrics over all ranks, by logged name, and one row per completion."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    counts: RewardCounts | None = None  # of this rank's calls of the reward; the trainer logs their sum over ranks


class Generate(Protocol):
    """Completions by the policy as it is now, with the settings that evaluations sample with (`sampler`)."""

    def __call__(
        self,
        prompts: Prompts,
        numbers: Sequence[int],
        guidance: Guidance | None = None,
        samples: Sequence[int] | None = None,
    ) -> Rollout:
        """One completion for each prompt. `numbers` seed the noise: the same number always gets the same noise.

        `samples` distinguishes several completions of one number (None: each is its first, sample 0).
        """
        ...


class Evaluator(Protocol):
    """Something to measure every `run.eval_steps` steps. All ranks call it together.

    Where ranks generate different numbers of batches, wrap that part in `policy.forward_passes()`, and exchange results
    after it.
    """

    name: str  # its rows become completions/NAME_STEP.parquet

    def __call__(self, generate: Generate, step: int) -> Evaluation:
        """The evaluation after `step` training steps; the same on every rank."""
        ...


def sampler(config: Config) -> RolloutConfig:
    """How evaluations write completions: as rollouts do, at the temperature `eval.temperature` if there is one."""
    temperature = config.eval.temperature
    return config.rollout if temperature is None else replace(config.rollout, temperature=temperature)


def generate_with(policy: Policy, config: Config) -> Generate:
    """`Generate` by this policy, with the noise of evaluations."""

    def completions(
        prompts: Prompts,
        numbers: Sequence[int],
        guidance: Guidance | None = None,
        samples: Sequence[int] | None = None,
    ) -> Rollout:
        which = samples if samples is not None else [0] * len(numbers)
        seeds = [generator(config.run.seed, 0, i, noise_of("eval", s)) for i, s in zip(numbers, which, strict=True)]
        return generate(policy, prompts, sampler(config), seeds, guidance)

    return completions


def noise_of(purpose: str, sample: int) -> str:
    """The purpose (seeds.py) of random numbers of a prompt's completion `sample`, whatever number of them there are."""
    return purpose if sample == 0 else f"{purpose}, sample {sample}"
