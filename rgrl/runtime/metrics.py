"""The metrics of a rollout over all processes. `rgrl/tracking/glossary.py` explains each. Collective."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from rgrl.algo.advantages import zero_spread
from rgrl.algo.corrections import correction, effective_sample_size, log_ratio
from rgrl.config import Config
from rgrl.rewards.bridge import NAMES, SPECIAL, TEXT_KINDS, Coverage
from rgrl.rollout.denoise import DenoiseStats
from rgrl.runtime.collectives import fraction, quantiles, total
from rgrl.types import Rollout, masked_mean


def rollout_metrics(
    accelerator: Accelerator,
    rollout: Rollout,
    is_end: Callable[[Tensor], Tensor],
    reward_B: Tensor,
    terms: dict[str, Tensor],
    G: int,
) -> dict[str, float]:
    """Rewards and lengths over all ranks. `terms` are the reward's terms by name, each r_B; NaN is no reward."""
    mask_BC = rollout.completion_mask_BC
    length_B = mask_BC.sum(1).float()
    clipped_B = ~is_end(rollout.completion_BC).any(1)
    all_B = accelerator.gather(reward_B.to(accelerator.device))
    lengths_B = accelerator.gather(length_B)
    metrics = {
        "reward": all_B.nanmean().item(),
        "reward_std": _std_in_groups(all_B.view(-1, G)),
        "frac_reward_zero_std": zero_spread(all_B, G).float().mean().item(),
        "completions/mean_length": lengths_B.mean().item(),
        "completions/min_length": lengths_B.min().item(),
        "completions/max_length": lengths_B.max().item(),
        "completions/clipped_ratio": accelerator.gather(clipped_B.float()).mean().item(),
    }
    for name, term_B in terms.items():
        everywhere_B = accelerator.gather(term_B.to(accelerator.device))
        rated_B = everywhere_B[~everywhere_B.isnan()]
        metrics[f"rewards/{name}/mean"] = rated_B.mean().item()
        metrics[f"rewards/{name}/std"] = rated_B.std(correction=0).item() if len(rated_B) else math.nan
    return metrics


def _std_in_groups(reward_PG: Tensor) -> float:
    """The mean over groups of the standard deviation within, of what has a reward; NaN where nothing has."""
    std_P = reward_PG.std(1, correction=0)
    for p in reward_PG.isnan().any(1).nonzero()[:, 0].tolist():
        rated_G = reward_PG[p][~reward_PG[p].isnan()]
        std_P[p] = rated_G.std(correction=0) if len(rated_G) else float("nan")
    return std_P.nanmean().item()


def bridge_metrics(
    accelerator: Accelerator, rollout: Rollout, is_end: Callable[[Tensor], Tensor], coverage: Coverage
) -> dict[str, float]:
    """How the guide is shown the text tokens of a rollout, up to the first end token, and of the vocabulary."""
    token_BC = rollout.completion_BC
    kind_BC = coverage.kind_V.to(token_BC.device)[token_BC]
    text_BC = (is_end(token_BC).cumsum(1) == 0) & (kind_BC != SPECIAL)
    vocabulary = coverage.counts()
    metrics, every = {}, max(1.0, total(accelerator, text_BC.sum().float()))
    for kind, name in zip(TEXT_KINDS, NAMES, strict=False):
        metrics[f"bridge/{name}"] = total(accelerator, (text_BC & (kind_BC == kind)).sum().float()) / every
        metrics[f"bridge/vocabulary/{name}"] = float(vocabulary[name])
    return metrics


def guidance_metrics(
    accelerator: Accelerator, config: Config, rollout: Rollout, stats: DenoiseStats
) -> dict[str, float]:
    """What guidance did to a rollout, and how far apart policy and guided sampler are, over all ranks."""
    decided_BC = rollout.decided_BC
    log_c_BC = log_ratio(rollout, "token")
    inside_BC = decided_BC & log_c_BC.isfinite()
    inside = max(1.0, total(accelerator, inside_BC.sum().float()))
    c_B = accelerator.gather(log_ratio(rollout, "sequence").exp())
    weight_B = accelerator.gather(masked_mean(correction(rollout, config.objective), decided_BC))
    metrics = {
        "guidance/changed": fraction(accelerator, stats.changed, stats.guided),
        "guidance/broken": total(accelerator, sum(stats.broken, torch.zeros(()))),
        "guidance/delta_logp": -total(accelerator, torch.where(inside_BC, log_c_BC, 0.0).sum()) / inside,
        "guidance/outside_support": 1 - inside / total(accelerator, decided_BC.sum().float()),
        "correction/mean": weight_B.mean().item(),
        "correction/ess_full": effective_sample_size(c_B).item(),
        "correction/ess": effective_sample_size(weight_B).item(),
    }
    metrics |= quantiles(accelerator, "correction/token", log_c_BC[decided_BC].exp())
    metrics |= quantiles(accelerator, "correction/sequence_log", log_ratio(rollout, "sequence").clamp(min=-1e3))
    for quarter, pairs in stats.weight.items():  # all four on every rank, whether or not its rows got that far
        hidden = total(accelerator, torch.tensor(float(sum(n for _, n in pairs))))
        weight = total(accelerator, torch.stack([w for w, _ in pairs]).sum() if pairs else torch.zeros(()))
        if hidden > 0:
            metrics[f"guidance/entropy_weight/q{quarter}"] = weight / hidden
    return metrics
