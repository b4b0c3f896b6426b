"""What the adapter is trained to do: pure functions from `LossInputs` to `LossOutputs`.

A loss is a sum and what to divide it by. The trainer adds both up over micro-batches and ranks before it
divides, so the number of either changes nothing. A new objective is a function decorated by nothing:
wrap it in `Objective` with what it needs, and name it by dotted path.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgrl.config import ObjectiveConfig
from rgrl.types import LossInputs, LossOutputs, masked_sum


@dataclass(frozen=True)
class Objective:
    """`needs` names the extra log-probabilities it reads: `old` and `ref`; only those are computed."""

    loss: Callable[[LossInputs, ObjectiveConfig], LossOutputs]
    needs: frozenset[str] = field(default_factory=frozenset)


def k3(logp_BC: Tensor, ref_logp_BC: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), never negative: e^d - d - 1 with d = ref - new.

    Schulman, "Approximating KL divergence" (2020), estimator k3.
    """
    d_BC = ref_logp_BC - logp_BC
    return d_BC.exp() - d_BC - 1


def likelihood(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """RGRL's own: minus the mean log-probability of each guided completion, all alike (2602.05000, section 4)."""
    length_B = inputs.mask_BC.sum(1).clamp(min=1)
    mean_B = torch.where(inputs.mask_BC, inputs.logp_BC, 0.0).sum(1) / length_B
    return _with_kl(-mean_B.sum(), torch.tensor(float(len(mean_B)), device=mean_B.device), inputs, config, per_row=True)


def reinforce(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """-A l per token, normalised by tokens (the global token mean of DAPO, arXiv 2503.14476)."""
    loss_BC = -inputs.advantage_B[:, None] * inputs.logp_BC
    return _with_kl(masked_sum(loss_BC, inputs.mask_BC), inputs.mask_BC.sum().float(), inputs, config)


def grpo(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) per token, rho = exp(l - l_old) (GRPO, arXiv 2402.03300, eq. 3)."""
    assert inputs.old_logp_BC is not None
    ratio_BC = (inputs.logp_BC - inputs.old_logp_BC).exp()
    A_B1 = inputs.advantage_B[:, None]
    clipped_BC = ratio_BC.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    loss_BC = -torch.minimum(ratio_BC * A_B1, clipped_BC * A_B1)
    low_BC = (ratio_BC < 1 - config.epsilon_low) & (A_B1 < 0)
    high_BC = (ratio_BC > 1 + config.epsilon_high) & (A_B1 > 0)
    out = _with_kl(masked_sum(loss_BC, inputs.mask_BC), inputs.mask_BC.sum().float(), inputs, config)
    out.metrics["clip_ratio/low"] = masked_sum(low_BC.float(), inputs.mask_BC)
    out.metrics["clip_ratio/high"] = masked_sum(high_BC.float(), inputs.mask_BC)
    out.metrics["ratio"] = masked_sum(ratio_BC.detach(), inputs.mask_BC)
    return out


def _with_kl(
    loss_sum: Tensor, denominator: Tensor, inputs: LossInputs, config: ObjectiveConfig, per_row: bool = False
) -> LossOutputs:
    metrics: dict[str, Tensor] = {}
    if inputs.ref_logp_BC is not None:
        kl_BC = torch.where(inputs.mask_BC, k3(inputs.logp_BC, inputs.ref_logp_BC), 0.0)
        kl_sum = (kl_BC.sum(1) / inputs.mask_BC.sum(1).clamp(min=1)).sum() if per_row else kl_BC.sum()
        loss_sum = loss_sum + config.beta * kl_sum
        metrics["kl"] = kl_sum.detach()
    return LossOutputs(loss_sum, denominator, metrics)


OBJECTIVES: dict[str, Objective] = {
    "likelihood": Objective(likelihood),
    "reinforce": Objective(reinforce),
    "grpo": Objective(grpo, frozenset({"old"})),
}
