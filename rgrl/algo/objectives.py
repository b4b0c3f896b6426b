"""Losses: pure functions from `LossInputs` to `LossOutputs`, one paper each.

A loss is a sum and its denominator. `update_step` sums both over micro-batches and ranks before it divides, so the
number of either changes nothing. A new objective is a plain function: wrap it in `Objective` with what it needs, and
add it to `OBJECTIVES` or name it by dotted path.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgrl.config import ObjectiveConfig
from rgrl.types import LossInputs, LossOutputs, masked_mean


@dataclass(frozen=True)
class Objective:
    """A loss, what it needs, and what it can be combined with. An empty set of names allows all.

    `needs`, of which only what is named is computed: `old` and `ref` log-probabilities, `behaviour` (the importance
    weights), `reference_states` (for readouts that compare with the base, such as `kl_to_reference`), `old_states` (the
    same of the policy before the first update).
    `readouts`: names of per-token values beside the log-probability (`rgrl.models.readout.READOUTS` or dotted paths),
    for losses over the whole vocabulary. `in_groups`: it compares the completions of one prompt.
    """

    loss: Callable[[LossInputs, ObjectiveConfig], LossOutputs]
    needs: frozenset[str] = field(default_factory=frozenset)
    estimators: frozenset[str] = field(default_factory=frozenset)
    advantages: frozenset[str] = field(default_factory=frozenset)
    readouts: tuple[str, ...] = ()
    in_groups: bool = True


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) from one sample, never negative: e^d - d - 1 with d = ref - new.

    Schulman, "Approximating KL divergence" (2020), estimator k3.
    """
    d = ref_logp - logp
    return d.exp() - d - 1


def likelihood(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """The RGRL paper's: minus the mean log-probability of each completion (arXiv 2602.05000, section 4)."""
    return _by_row(-_row_mean(inputs.logp_BC, inputs), inputs, config)


def weighted(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """-A times the mean log-probability of each row. With the advantage `reward_weighted` it is reward-weighted
    regression, whose weights sum to G within a group (Peters and Schaal 2007)."""
    return _by_row(-inputs.advantage_B * _row_mean(_corrected(inputs) * inputs.logp_BC, inputs), inputs, config)


def wd1(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """-A times the summed log-probability of each row. With the advantage `wd1` it is wd1 (arXiv 2507.08838)."""
    return _by_row(-inputs.advantage_B * _row_sum(_corrected(inputs) * inputs.logp_BC, inputs), inputs, config)


def reinforce(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """-c A l per token, normalised by tokens (the global token mean of DAPO, arXiv 2503.14476)."""
    return _by_token(-_corrected(inputs) * inputs.advantage_B[:, None] * inputs.logp_BC, inputs, config)


def grpo(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """-c min(rho A, clip(rho, 1 - low, 1 + high) A).

    Token level: rho = exp(l - l_old), normalised by tokens (GRPO, arXiv 2402.03300, equation 3). Sequence level: rho is
    the exponential of the row's mean difference, normalised by rows (GSPO, arXiv 2507.18071, equation 5).
    """
    assert inputs.old_logp_BC is not None
    by_token = config.level == "token"
    if by_token:
        ratio, A = (inputs.logp_BC - inputs.old_logp_BC).exp(), inputs.advantage_B[:, None]
        c, mask = _corrected(inputs), inputs.mask_BC
    else:
        ratio, A = _row_mean(inputs.logp_BC - inputs.old_logp_BC, inputs).exp(), inputs.advantage_B
        c, mask = _corrected(inputs)[:, 0], inputs.mask_BC.any(1)
    clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    loss = -c * torch.minimum(ratio * A, clipped * A)
    out = _by_token(loss, inputs, config) if by_token else _by_row(loss, inputs, config)
    low, high = (ratio < 1 - config.epsilon_low) & (A < 0), (ratio > 1 + config.epsilon_high) & (A > 0)
    for name, value in (("clip_ratio/low", low), ("clip_ratio/high", high), ("ratio", ratio.detach())):
        out.metrics[name] = torch.where(mask, value.float(), 0.0).sum()
    out.samples["ratio"] = ratio.detach()[mask]
    return out


def gdsd(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """((l - l_old) / C - psi A)^2 for each row, with psi = 1 / `config.weight_temperature` (GDSD, arXiv 2605.29398).

    l is the row's sum, C the completion length: the policy is pulled to where its log-ratio is the advantage's tilt.
    """
    assert inputs.old_logp_BC is not None
    gap_B = _row_sum(inputs.logp_BC - inputs.old_logp_BC, inputs) / inputs.mask_BC.shape[1]
    target_B = inputs.advantage_B / config.weight_temperature
    return _by_row(_corrected(inputs)[:, 0] * (gap_B - target_B).square(), inputs, config)


def tilt_matching(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """-(w - c) mean l + c mean H for each row, w the weights G softmax(r / beta) of the group, c = `config.control`.

    H_i is the cross-entropy of the policy with the one before the first update, over the whole vocabulary, where l_i is
    evaluated: what the first part is in the mean without a reward. Taking out c of one and adding it back as the other
    leaves the target, the old policy tilted by exp(r / beta) at every state, and takes its noise away (Discrete Tilt
    Matching, arXiv 2604.18739, as we understand it). The advantage is w - 1.
    """
    c, weight_B = config.control, inputs.advantage_B + 1 - config.control
    cross_B = _row_mean(inputs.readouts["cross_entropy_to_old"], inputs)
    mean_B = _row_mean(_corrected(inputs) * inputs.logp_BC, inputs)
    return _by_row(c * cross_B - weight_B * mean_B, inputs, config)


def _corrected(inputs: LossInputs) -> Tensor:
    return inputs.correction_BC if inputs.correction_BC is not None else torch.ones_like(inputs.logp_BC)


def _row_sum(value_BC: Tensor, inputs: LossInputs) -> Tensor:
    """Sum over the tokens included in the loss; values elsewhere are ignored, infinite ones too."""
    return torch.where(inputs.mask_BC, value_BC, 0.0).sum(1)


def _length(inputs: LossInputs) -> Tensor:
    return inputs.mask_BC.sum(1).clamp(min=1)


def _row_mean(value_BC: Tensor, inputs: LossInputs) -> Tensor:
    return masked_mean(value_BC, inputs.mask_BC)


def _kl(inputs: LossInputs, config: ObjectiveConfig) -> Tensor | None:
    """KL to the reference, kl_B, summed over each row; None where nothing asks for it.

    Over the whole vocabulary (`objective.kl: full`), or k3; that is for sequence estimates of the mean token, times
    length.
    """
    if config.beta > 0 and config.kl == "full":
        return _row_sum(inputs.readouts["kl_to_reference"], inputs)
    if inputs.ref_logp_BC is None:
        return None
    if inputs.by_sequence:
        mean_B, ref_B = (_row_mean(l_BC, inputs) for l_BC in (inputs.logp_BC, inputs.ref_logp_BC))
        return k3(mean_B, ref_B) * _length(inputs)
    return _row_sum(k3(inputs.logp_BC, inputs.ref_logp_BC), inputs)


def _by_token(loss_BC: Tensor, inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """Every token of the batch has the same weight."""
    kl_B = _kl(inputs, config)
    kl = kl_B.sum() if kl_B is not None else None
    return _outputs(_row_sum(loss_BC, inputs).sum(), inputs.mask_BC.sum().float(), kl, config)


def _by_row(loss_B: Tensor, inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
    """Every row of the batch has the same weight."""
    kl_B = _kl(inputs, config)
    kl = (kl_B / _length(inputs)).sum() if kl_B is not None else None
    return _outputs(loss_B.sum(), torch.tensor(float(len(loss_B)), device=loss_B.device), kl, config)


def _outputs(loss_sum: Tensor, denominator: Tensor, kl: Tensor | None, config: ObjectiveConfig) -> LossOutputs:
    if kl is None:
        return LossOutputs(loss_sum, denominator)
    return LossOutputs(loss_sum + config.beta * kl, denominator, {"kl": kl.detach()})


_BEHAVIOUR = frozenset({"behaviour"})
OBJECTIVES: dict[str, Objective] = {
    "likelihood": Objective(likelihood, in_groups=False),
    "weighted": Objective(weighted, _BEHAVIOUR, advantages=frozenset({"reward_weighted"})),
    "wd1": Objective(wd1, _BEHAVIOUR, advantages=frozenset({"wd1"})),
    "reinforce": Objective(reinforce, _BEHAVIOUR),
    "grpo": Objective(grpo, _BEHAVIOUR | {"old"}),
    # -sum A_j bound_j |y_j| / sum |y_j|; the estimator gives the bound for each sign of A (arXiv 2510.09541).
    "spg": Objective(reinforce, _BEHAVIOUR, frozenset({"block_bounds"})),
    # Weights minus their baseline (DMPO, arXiv 2510.08233).
    "dmpo": Objective(weighted, _BEHAVIOUR, advantages=frozenset({"tilted"})),
    "gdsd": Objective(gdsd, _BEHAVIOUR | {"old"}),
    "tilt_matching": Objective(
        tilt_matching,
        _BEHAVIOUR | {"old_states"},
        frozenset({"one_step", "elbo", "coupled", "quadrature", "sequence_elbo"}),
        frozenset({"tilted"}),
        ("cross_entropy_to_old",),
    ),
}
