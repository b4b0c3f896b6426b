"""The numbers of a step, over all processes: what tracking.py's glossary says of rewards, lengths and guidance.

Every function here is collective: all processes call it, and all get the same answer.
"""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from rgrl.advantages import zero_spread
from rgrl.config import Config
from rgrl.corrections import correction, effective_sample_size, log_ratio
from rgrl.denoise import DenoiseStats
from rgrl.types import Rollout, masked_mean


def rollout_metrics(
    accelerator: Accelerator,
    rollout: Rollout,
    is_end: Callable[[Tensor], Tensor],
    reward_B: Tensor,
    parts: dict[str, Tensor],
    G: int,
) -> dict[str, float]:
    """What the glossary in tracking.py says of rewards, lengths and guidance, over all ranks."""
    mask_BC = rollout.completion_mask_BC
    length_B = mask_BC.sum(1).float()
    clipped_B = ~is_end(rollout.completion_BC).any(1)
    all_B = accelerator.gather(reward_B.to(accelerator.device))
    lengths_B = accelerator.gather(length_B)
    metrics = {
        "reward": all_B.mean().item(),
        "reward_std": all_B.view(-1, G).std(1, correction=0).mean().item(),
        "frac_reward_zero_std": zero_spread(all_B, G).float().mean().item(),
        "completions/mean_length": lengths_B.mean().item(),
        "completions/min_length": lengths_B.min().item(),
        "completions/max_length": lengths_B.max().item(),
        "completions/clipped_ratio": accelerator.gather(clipped_B.float()).mean().item(),
    }
    for name, part_B in parts.items():
        everywhere_B = accelerator.gather(part_B.to(accelerator.device))
        metrics[f"rewards/{name}/mean"] = everywhere_B.mean().item()
        metrics[f"rewards/{name}/std"] = everywhere_B.std(correction=0).item()
    return metrics


def guidance_metrics(
    accelerator: Accelerator, config: Config, rollout: Rollout, stats: DenoiseStats
) -> dict[str, float]:
    """What guidance did to a rollout and what correcting for it would take, over all ranks."""
    decided_BC = rollout.decided_BC
    log_c_BC = log_ratio(rollout, "token")
    inside_BC = decided_BC & log_c_BC.isfinite()
    inside = max(1.0, total(accelerator, inside_BC.sum().float()))
    c_B = accelerator.gather(log_ratio(rollout, "sequence").exp())
    weight_B = accelerator.gather(masked_mean(correction(rollout, config.objective), decided_BC))
    metrics = {
        "guidance/changed": share(accelerator, stats.changed, stats.guided),
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


def quantiles(accelerator: Accelerator, name: str, value_N: Tensor) -> dict[str, float]:
    """`NAME/p05`, `NAME/p50` and `NAME/p95` over all ranks, each of which may have another number of values.

    Of all values, or of 2^20 spread evenly over them: each process receives them, and torch sorts no more than 2^24.
    """
    most = max(1, 2**20 // accelerator.num_processes)
    value_N = value_N[:: max(1, math.ceil(len(value_N) / most))]
    everywhere_N = accelerator.gather(accelerator.pad_across_processes(value_N.float(), pad_index=float("nan")))
    at_3 = everywhere_N.nanquantile(torch.tensor([0.05, 0.5, 0.95], device=everywhere_N.device))
    return {f"{name}/{q}": float(value) for q, value in zip(("p05", "p50", "p95"), at_3, strict=True)}


def reduce_sum(accelerator: Accelerator, value: Tensor) -> Tensor:
    """The sum over ranks, of a tensor on each one's device."""
    return accelerator.reduce(value, "sum") if accelerator.num_processes > 1 else value


def total(accelerator: Accelerator, value: Tensor) -> float:
    """The same of a scalar anywhere, as a number."""
    return float(reduce_sum(accelerator, value.to(accelerator.device)))


def counts(accelerator: Accelerator, values: list[int]) -> list[int]:
    """Whole numbers added up over ranks, exactly, in one exchange."""
    if accelerator.num_processes == 1:
        return values
    return reduce_sum(accelerator, torch.tensor(values, dtype=torch.int64, device=accelerator.device)).tolist()


def share(accelerator: Accelerator, part: list[Tensor], whole: list[Tensor]) -> float:
    """The sum of the one over all ranks divided by that of the other."""
    return total(accelerator, sum(part, torch.zeros(()))) / max(1.0, total(accelerator, sum(whole, torch.zeros(()))))
