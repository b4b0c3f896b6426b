"""Estimates of a completion's token log-probabilities under a model that has no left-to-right factorisation.

An estimator is a pair of functions: `draw` makes the noise once, as data; `estimate` turns noise and model
into l_BC. The old, reference and new estimates share one draw, so their ratio is exactly 1 while the
adapter is unchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgrl.config import ObjectiveConfig
from rgrl.types import NoiseDraw, Rollout

# canvas_BL, attention_BL, at_BL (bool), token_N -> logp_N, as `Policy.logp`
LogpFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Estimator:
    """`draw(rollout, config, one generator a row)` and `estimate(logp, rollout, noise, mask_id)`."""

    draw: Callable[[Rollout, ObjectiveConfig, Sequence[torch.Generator]], NoiseDraw]
    estimate: Callable[[LogpFn, Rollout, NoiseDraw, int], Tensor]


def draw_one_step(rollout: Rollout, config: ObjectiveConfig, generators: Sequence[torch.Generator]) -> NoiseDraw:
    """Hide the whole completion, and each prompt token with probability `config.prompt_mask`."""
    L, C = rollout.canvas_BL.shape[1], rollout.completion_mask_BC.shape[1]
    # Counted from the right, so that what a prompt's tokens draw doesn't depend on the padding before it.
    u_BL = torch.stack([torch.rand(L, generator=g) for g in generators]).flip(1).to(rollout.canvas_BL.device)
    hidden_BL = (u_BL < config.prompt_mask) & rollout.attention_BL
    hidden_BL[:, L - C :] = True
    return NoiseDraw(hidden_BL[None])


def estimate_one_step(logp: LogpFn, rollout: Rollout, noise: NoiseDraw, mask_id: int) -> Tensor:
    """l_BC in nats, 0 past the end token: one forward over the hidden completion (diffu-GRPO, 2504.12216, 3.2).

    Only the tokens that count are asked for.
    """
    L, C = rollout.canvas_BL.shape[1], rollout.completion_mask_BC.shape[1]
    at_BL = torch.zeros_like(rollout.attention_BL)
    at_BL[:, L - C :] = rollout.completion_mask_BC
    canvas_BL = rollout.canvas_BL.masked_fill(noise.hidden_KBL[0], mask_id)
    logp_N = logp(canvas_BL, rollout.attention_BL, at_BL, rollout.canvas_BL[at_BL])
    return torch.zeros(rollout.completion_mask_BC.shape, device=logp_N.device).masked_scatter(
        rollout.completion_mask_BC, logp_N
    )


@torch.no_grad()
def masked_nll(
    logp: LogpFn, rollout: Rollout, generators: Sequence[torch.Generator], mask_id: int
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood (nats) of hidden completion tokens and their number, both scalars.

    Tokens that count are hidden at rates .25, .5 and .75; where the reference adapter context is active, this
    is how likely the frozen base finds the text. One generator a row; the same states give the same noise.
    """
    L, C = rollout.canvas_BL.shape[1], rollout.completion_mask_BC.shape[1]
    device = rollout.canvas_BL.device
    total, count = torch.zeros((), device=device), torch.zeros((), device=device)
    for rate in (0.25, 0.5, 0.75):
        u_BC = torch.stack([torch.rand(C, generator=g) for g in generators]).to(device)
        at_BL = torch.zeros_like(rollout.attention_BL)
        at_BL[:, L - C :] = (u_BC < rate) & rollout.completion_mask_BC
        # What follows the end token is not part of the text and tells nothing: it is hidden too.
        hidden_BL = at_BL.clone()
        hidden_BL[:, L - C :] |= ~rollout.completion_mask_BC
        canvas_BL = rollout.canvas_BL.masked_fill(hidden_BL, mask_id)
        total -= logp(canvas_BL, rollout.attention_BL, at_BL, rollout.canvas_BL[at_BL]).sum()
        count += at_BL.sum()
    return total, count


ESTIMATORS: dict[str, Estimator] = {"one_step": Estimator(draw_one_step, estimate_one_step)}
