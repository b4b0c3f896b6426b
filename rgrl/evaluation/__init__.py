"""Evaluators: what a run is measured by.

To add one, write a class like `HeldOut` (held_out.py) and append it to `run.evaluators` in `rgrl.setup.set_up`.
Its own prompts need the chat template (`prompts.formatted(policy.format_prompt)`), its metrics a line in the glossary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rgrl.rollout.guidance import Guidance
from rgrl.types import Prompts, Rollout

__all__ = ["Evaluation", "Evaluator", "Generate"]


@dataclass(frozen=True)
class Evaluation:
    """Metrics over all ranks, by logged name, and one row per completion."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


class Generate(Protocol):
    """Completions by the policy as it is now, with the run's rollout settings."""

    def __call__(self, prompts: Prompts, numbers: Sequence[int], guidance: Guidance | None = None) -> Rollout:
        """One completion for each prompt. `numbers` seed the noise: the same number always gets the same noise."""
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
