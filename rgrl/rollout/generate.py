"""Text from prompts: encode, draw the noise, denoise. Training, evaluation, sampling and benchmarks all come here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rgrl.config import RolloutConfig
from rgrl.errors import ConfigError
from rgrl.models import Policy
from rgrl.rollout.denoise import DenoiseStats, RolloutNoise, denoise
from rgrl.rollout.guidance import Guidance
from rgrl.seeds import generators as seeded_generators
from rgrl.types import Prompts, Rollout


def generate(
    policy: Policy,
    prompts: Prompts | Sequence[str],
    config: RolloutConfig | None = None,
    generators: Sequence[torch.Generator] | None = None,
    guidance: Guidance | None = None,
    guided_B: Tensor | None = None,
    stats: DenoiseStats | None = None,
) -> Rollout:
    """One completion for each of B prompts; `policy.decode(rollout.completion_BC)` is their text.

    Strings are user turns and get the policy's chat template; `Prompts` are taken as they are (`Prompts.inputs`).
    `generators`, one a row, hold the noise: row b depends on its generator alone (None: seed 0). With `guidance` the
    rows of `guided_B` (bool; None: all) are steered, the others are not. Works on `config.micro_batch`
    rows at a time; `stats` collects what the loop saw. Raises `ConfigError` for a canvas beyond the model's positions.
    """
    config = config if config is not None else RolloutConfig()
    if not isinstance(prompts, Prompts):
        prompts = Prompts(list(prompts), [{} for _ in prompts]).formatted(policy.format_prompt)
    B, C = len(prompts), config.max_completion_length
    if generators is None:
        generators = seeded_generators(0, 0, range(B), "generate")
    prompt_BL, attention_BL = policy.encode(prompts.inputs)
    if prompt_BL.shape[1] + C > policy.max_length:
        raise ConfigError(
            f"`rollout.max_completion_length` {C} after a prompt of {prompt_BL.shape[1]} tokens is beyond the model's "
            f"{policy.max_length} positions"
        )
    noise = RolloutNoise.draw(generators, config.steps, C, guidance.config.steps if guidance is not None else 0)
    if guided_B is None or guidance is None:
        guided_B = torch.full((B,), guidance is not None)
    rollouts, order = [], []
    for rows_X, guided in ((guided_B.nonzero()[:, 0], True), ((~guided_B).nonzero()[:, 0], False)):
        for rows_A in rows_X.split(config.micro_batch or B) if len(rows_X) else ():
            guide = guidance.guide(prompts.take(rows_A.tolist())) if guided and guidance is not None else None
            some = prompt_BL[rows_A], attention_BL[rows_A], config, noise.rows(rows_A)
            rollouts.append(denoise(policy, *some, guide, stats))
            order.append(rows_A)
    return Rollout.join(rollouts).rows(torch.cat(order).argsort().to(policy.device))
