"""Importance weights for tokens sampled under guidance.

A guided rollout comes from mu, the steered sampler; the gradient wanted is that of the policy pi. The rollout holds
the log-probability of every token under both, so c = pi / mu needs no further forward pass. The product of c over
`Rollout.decided_BC` is the exact ratio of the two trajectories' probabilities if both unmask in the same order and mu
can write whatever pi can (see `exact`).
"""

import torch
from torch import Tensor

from rgrl.config import Config, ObjectiveConfig
from rgrl.rollout.sampling import IGNORES_SAMPLES
from rgrl.types import Rollout


def log_ratio(rollout: Rollout, level: str) -> Tensor:
    """log pi - log mu in nats, -inf where pi has no support: per token (BC, 0 where undecided) or per row (B)."""
    decided_BC = rollout.decided_BC
    ratio_BC = torch.where(decided_BC, rollout.policy_logp_BC - rollout.behaviour_logp_BC, 0.0)
    return ratio_BC if level == "token" else ratio_BC.sum(1)


def correction(rollout: Rollout, config: ObjectiveConfig) -> Tensor:
    """Weights correction_BC, float32, the same for all tokens of a row at sequence level.

    `none`: 1. `truncate`: min(c, correction_max), biased but of bounded variance (truncated importance sampling,
    Ionides 2008). `mask`: c inside the band correction_min ... correction_max, 0 outside it.
    """
    if config.correction == "none":
        return torch.ones_like(rollout.policy_logp_BC)
    c = log_ratio(rollout, config.correction_level).exp()
    if config.correction == "truncate":
        c = c.clamp(max=config.correction_max)
    else:
        c = torch.where((c >= config.correction_min) & (c <= config.correction_max), c, 0.0)
    return c if config.correction_level == "token" else c[:, None].expand_as(rollout.policy_logp_BC)


def effective_sample_size(c_B: Tensor) -> Tensor:
    """(sum c)^2 / (n sum c^2) in 0 ... 1: the fraction of the rows that a weighted mean is worth (Kong 1992)."""
    return c_B.sum() ** 2 / (len(c_B) * c_B.square().sum()).clamp(min=1e-30)


def exact(config: Config) -> bool:
    """Whether the product of c over a row is the exact ratio of the guided and the unguided trajectory.

    The unmasking order must ignore sampled tokens and guidance, and every token in the policy's support must be inside
    the guided support. Truncating the steered logits separately would break the second condition. Equally confident
    positions break neither: the unsteered logits order them (rgrl/rollout/sampling.py).

    Nor do blocks with a cache: both log-probabilities are then those of a sampler that reads its cache. But no
    estimator does, so the corrected gradient is the on-policy one only with `rollout.block_cache: false`.
    """
    r, g = config.rollout, config.guidance
    by_policy = r.confidence_from == "policy"
    order = (by_policy and r.confidence in IGNORES_SAMPLES) or (r.confidence == "origin" and r.commit_above == 1)
    reach = g.support == "policy" or (r.top_p == 1 and r.top_k == 0)
    return g.kind == "none" or (order and not r.defer_eos and reach)
