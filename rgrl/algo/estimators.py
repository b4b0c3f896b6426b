"""Estimates of a completion's token log-probabilities under a model without a left-to-right factorisation.

An estimator turns random numbers into data once (`draw`): K canvases, given as masks, and the weight of each token's
log-probability there. `estimate` turns that and a model into l_BC. The old, reference and new estimates share one draw,
so their ratio is exactly 1 while the adapter is unchanged.

Tokens after the first end token are not part of the text. Every canvas hides them, so they leak nothing, except in
`trajectory`, which shows each canvas as the sampler saw it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rgrl.config import ObjectiveConfig
from rgrl.types import NoiseDraw, Rollout

# canvas_BL, attention_BL, at_BL (bool), token_N -> logp_N, as `Policy.logp`
LogpFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Number of the canvas in its draw, canvas_BL, attention_BL, at_BL (bool), token_N -> values by name, first dimension N:
# `logp`, and what else an objective asks for (`Objective.readouts`). One call is one forward pass.
ValuesFn = Callable[[int, Tensor, Tensor, Tensor, Tensor], Mapping[str, Tensor]]


def only_logp(logp: LogpFn) -> ValuesFn:
    """The values that `estimate` takes, where log-probabilities are all that is wanted."""
    return lambda k, canvas_BL, attention_BL, at_BL, token_N: {"logp": logp(canvas_BL, attention_BL, at_BL, token_N)}


def weighted_sum(
    values: ValuesFn, rollout: Rollout, noise: NoiseDraw, mask_id: int, config: ObjectiveConfig, advantage_B: Tensor
) -> dict[str, Tensor]:
    """Each value (BC...) summed over canvases with its token's weight; `logp` in nats. One forward pass a canvas."""
    totals: dict[str, Tensor] = {"logp": torch.zeros(noise.count_BC.shape, device=noise.count_BC.device)}
    for k, weight_BC in enumerate(noise.weight_KBC):
        for name, value in on_canvas(values, rollout, noise, k, mask_id).items():
            weighted = weight_BC.view(*weight_BC.shape, *[1] * (value.ndim - 2)) * value
            totals[name] = totals[name] + weighted if name in totals else weighted
    return totals


def bounds(
    values: ValuesFn, rollout: Rollout, noise: NoiseDraw, mask_id: int, config: ObjectiveConfig, advantage_B: Tensor
) -> dict[str, Tensor]:
    """`logp` in nats: a lower bound of the log-likelihood where the advantage is above 0, else mixed with an upper one.

    lower = sum_k w_k l_k; upper = 1/b log sum_k w_k p_k^b with b = `config.upper_power`; rows with A <= 0 get
    m upper + (1 - m) lower with m = `config.upper_share` (SPG, arXiv 2510.09541, section 3). A token that no canvas
    hides has no estimate and is 0. Other values are summed as in `weighted_sum`.
    """
    b, m = config.upper_power, config.upper_share
    seen_BC = (noise.weight_KBC > 0).any(0)
    l_KBC: list[Tensor] = []

    def kept(k: int, *canvas: Tensor) -> Mapping[str, Tensor]:
        found = values(k, *canvas)
        l_KBC.append(_scatter(found["logp"], noise.weight_KBC[k] > 0))
        return found

    totals = weighted_sum(kept, rollout, noise, mask_id, config, advantage_B)
    terms = [
        torch.where(weight_BC > 0, weight_BC.clamp(min=1e-30).log() + b * l_BC, float("-inf"))
        for weight_BC, l_BC in zip(noise.weight_KBC, l_KBC, strict=True)
    ]
    # A row of -inf alone has no gradient, not even 0.
    upper_BC = torch.stack(terms).masked_fill(~seen_BC, 0.0).logsumexp(0) / b
    lower_BC = totals["logp"]
    mixed_BC = torch.where(seen_BC, m * upper_BC + (1 - m) * lower_BC, 0.0)
    return totals | {"logp": torch.where(advantage_B[:, None] > 0, lower_BC, mixed_BC)}


def on_canvas(values: ValuesFn, rollout: Rollout, noise: NoiseDraw, k: int, mask_id: int) -> dict[str, Tensor]:
    """The values (BC...) of the completion's tokens on canvas k, where they have a weight; 0 elsewhere."""
    at_BC = noise.weight_KBC[k] > 0
    at_BL = torch.zeros_like(rollout.attention_BL)
    at_BL[:, -at_BC.shape[1] :] = at_BC
    canvas_BL = rollout.canvas_BL.masked_fill(noise.hidden_KBL[k], mask_id)
    found = values(k, canvas_BL, rollout.attention_BL, at_BL, rollout.canvas_BL[at_BL])
    return {name: _scatter(value_N, at_BC) for name, value_N in found.items()}


def _scatter(value_N: Tensor, at_BC: Tensor) -> Tensor:
    """Values (N...) at their positions (BC...), 0 elsewhere."""
    shape = (*at_BC.shape, *value_N.shape[1:])
    mask = at_BC.view(*at_BC.shape, *[1] * (value_N.ndim - 1)).expand(shape)
    return torch.zeros(shape, dtype=value_N.dtype, device=value_N.device).masked_scatter(mask, value_N)


@dataclass(frozen=True)
class Estimator:
    """`draw(rollout, config, one generator a row)` makes the noise, `estimate` evaluates the model on it.

    `level` is what a number means: `token`, an estimate of this token's log-probability; `sequence`, a part of an
    estimate for the whole row, meaningful only in the row's sum. With `as_sampled` log-probabilities are under the
    sampler's temperature and truncation (the token itself always belongs to the support), else untempered.
    """

    draw: Callable[[Rollout, ObjectiveConfig, Sequence[torch.Generator]], NoiseDraw]
    level: Literal["token", "sequence"] = "token"
    as_sampled: bool = False
    estimate: Callable[[ValuesFn, Rollout, NoiseDraw, int, ObjectiveConfig, Tensor], dict[str, Tensor]] = weighted_sum


# ------------------------------------------------------------------------------------------------------- noise
def _uniform(generators: Sequence[torch.Generator], rollout: Rollout, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), the rows second: (shape[0], B, shape[1:])."""
    return torch.stack([torch.rand(shape, generator=g) for g in generators], 1).to(rollout.canvas_BL.device)


def _noise(rollout: Rollout, hidden_KBC: Tensor, weight_KBC: Tensor, count_BC: Tensor | None = None) -> NoiseDraw:
    """With the prompt shown."""
    prompt = rollout.canvas_BL.shape[1] - hidden_KBC.shape[2]
    hidden_KBL = torch.nn.functional.pad(hidden_KBC, (prompt, 0), value=False)
    return NoiseDraw(hidden_KBL, weight_KBC, rollout.completion_mask_BC if count_BC is None else count_BC)


def draw_one_step(rollout: Rollout, config: ObjectiveConfig, generators: Sequence[torch.Generator]) -> NoiseDraw:
    """Hide the whole completion, and each prompt token with probability `config.prompt_mask`; evaluate every token.

    diffu-GRPO (arXiv 2504.12216), section 3.2.
    """
    L, C = rollout.canvas_BL.shape[1], rollout.completion_mask_BC.shape[1]
    # Counted from the right, so that the numbers of a prompt's tokens don't depend on the padding before it.
    u_BL = _uniform(generators, rollout, 1, L)[0].flip(1)
    hidden_BL = (u_BL < config.prompt_mask) & rollout.attention_BL
    hidden_BL[:, L - C :] = True
    mask_BC = rollout.completion_mask_BC
    return NoiseDraw(hidden_BL[None], mask_BC.float()[None], mask_BC)


def draw_elbo(rollout: Rollout, config: ObjectiveConfig, generators: Sequence[torch.Generator]) -> NoiseDraw:
    """Hide each token with probability t, t uniform in (0, 1), and weigh by 1 / t; the mean of `config.draws` canvases.

    The K values of t of a row are (u + k) / K with one u: stratified. The row's sum has the evidence lower bound
    as its mean (LLaDA, arXiv 2502.09992, equation 3).
    """
    K, (_, C) = config.draws, rollout.completion_mask_BC.shape
    strata_K1 = torch.arange(K, device=rollout.canvas_BL.device)[:, None]
    t_KB1 = ((_uniform(generators, rollout, 1)[0] + strata_K1) / K).clamp(min=1e-6)[..., None]
    return _bernoulli(rollout, t_KB1, 1 / (K * t_KB1), _uniform(generators, rollout, K, C))


def draw_quadrature(rollout: Rollout, config: ObjectiveConfig, generators: Sequence[torch.Generator]) -> NoiseDraw:
    """As `elbo`, with t at the `config.draws` Gauss-Legendre nodes of (0, 1): only the masks are random.

    The integrand is a polynomial in t of degree C - 1, so the row's mean is exact up to a length of twice the nodes
    (GDPO, arXiv 2510.08554, section 4).
    """
    C = rollout.completion_mask_BC.shape[1]
    node_K, share_K = (x.to(rollout.canvas_BL.device)[:, None, None] for x in gauss_legendre(config.draws))
    u_KBC = _uniform(generators, rollout, config.draws, C)
    return _bernoulli(rollout, node_K, share_K / node_K, u_KBC)


def _bernoulli(rollout: Rollout, t_KB1: Tensor, weight_KB1: Tensor, u_KBC: Tensor) -> NoiseDraw:
    masked_KBC = (u_KBC < t_KB1) & rollout.completion_mask_BC
    return _noise(rollout, masked_KBC | ~rollout.completion_mask_BC, weight_KB1 * masked_KBC)


def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1) and weights that sum to 1, float32: exact for polynomials of degree 2 n - 1.

    Eigenvalues of the Jacobi matrix (Golub and Welsch 1969).
    """
    i = torch.arange(1, n, dtype=torch.float64)
    beside = i / (4 * i * i - 1).sqrt()
    node_n, vector_nn = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return ((1 + node_n) / 2).float(), vector_nn[0].square().float()


def draw_coupled(rollout: Rollout, config: ObjectiveConfig, generators: Sequence[torch.Generator]) -> NoiseDraw:
    """Evaluate each token once with everything hidden and once with a subset S or its complement hidden, each half.

    t uniform in (.2, .8), S holds each token with probability t; a token of S gets (a + b / t) / 2, one of the
    complement (a + c / (1 - t)) / 2; the mean over `config.draws` pairs (DiffuCoder, arXiv 2506.20639, equation 6).
    The expectation is half of each: a, b where S holds the token, c where it doesn't.
    """
    K, (_, C) = config.draws, rollout.completion_mask_BC.shape
    mask_BC = rollout.completion_mask_BC
    t_KB1 = 0.2 + 0.6 * _uniform(generators, rollout, K)[..., None]
    part_KBC = (_uniform(generators, rollout, K, C) < t_KB1) & mask_BC
    rest_KBC = ~part_KBC & mask_BC
    read_KBC = torch.cat([mask_BC[None], part_KBC, rest_KBC])
    weight_KBC = torch.cat([0.5 * mask_BC.float()[None], part_KBC * 0.5 / K / t_KB1, rest_KBC * 0.5 / K / (1 - t_KB1)])
    return _noise(rollout, read_KBC | ~mask_BC, weight_KBC)


def draw_sequence_elbo(rollout: Rollout, config: ObjectiveConfig, generators: Sequence[torch.Generator]) -> NoiseDraw:
    """Hide k of n tokens, k uniform in 0 ... n, and weigh by (n + 1) / k; and the same for the n - k others; half each.

    The mean over `config.draws` such pairs (ESPO, arXiv 2512.03759, section 4). The row's sum has the evidence lower
    bound as its mean.
    """
    K, (_, C) = config.draws, rollout.completion_mask_BC.shape
    mask_BC = rollout.completion_mask_BC
    n_B = mask_BC.sum(1)
    k_KB1 = _below(_uniform(generators, rollout, K), n_B + 1)[..., None]
    part_KBC = (_rank(_uniform(generators, rollout, K, C), mask_BC) < k_KB1) & mask_BC
    rest_KBC = ~part_KBC & mask_BC
    n_B1 = n_B[:, None]
    weights = [part_KBC * (n_B1 + 1) / k_KB1.clamp(min=1), rest_KBC * (n_B1 + 1) / (n_B1 - k_KB1).clamp(min=1)]
    return _noise(rollout, torch.cat([part_KBC, rest_KBC]) | ~mask_BC, torch.cat(weights) / (2 * K))


def _below(u: Tensor, n: Tensor) -> Tensor:
    """Whole numbers 0 ... n - 1, uniform where `u` is; a product that rounds up to n stays below it."""
    return torch.minimum((u * n).long(), n - 1)


def _rank(u_KBC: Tensor, among_BC: Tensor) -> Tensor:
    """The rank of each number among the included ones of its row; the others rank after them."""
    return u_KBC.masked_fill(~among_BC, 2.0).argsort(-1).argsort(-1)


def draw_trajectory(rollout: Rollout, config: ObjectiveConfig, generators: Sequence[torch.Generator]) -> NoiseDraw:
    """Evaluate each token on the canvas at the start of its step; `config.trajectory_steps` steps share a canvas.

    With one step a canvas this is the log-probability of the denoising Markov chain, exactly, in blocks if
    `rollout.block_cache` is false: a cached prefix is older than the canvas. No noise. (TraceRL, arXiv 2509.06949,
    section 4.2.) Includes all tokens committed while the row was open, also those after its end.
    """
    group_BC = rollout.unmask_step_BC // config.trajectory_steps
    count_BC = rollout.decided_BC
    chosen_KB1 = torch.arange(int(group_BC[count_BC].max()) + 1, device=group_BC.device)[:, None, None]
    return _noise(rollout, group_BC >= chosen_KB1, ((group_BC == chosen_KB1) & count_BC).float(), count_BC)


def draw_trajectory_sampled(
    rollout: Rollout, config: ObjectiveConfig, generators: Sequence[torch.Generator]
) -> NoiseDraw:
    """`config.draws` of a row's n canvases of `trajectory`, evenly spaced from a random start, each weighed by n / K.

    AGRPO (arXiv 2510.04019, section 4) samples steps; the even spacing is ours. The row's sum has the log-probability
    of the trajectory as its mean.
    """
    K = config.draws
    group_BC = rollout.unmask_step_BC // config.trajectory_steps
    count_BC = rollout.decided_BC
    n_B = group_BC.masked_fill(~count_BC, -1).amax(1) + 1
    strata_K1 = torch.arange(K, device=n_B.device)[:, None]
    chosen_KB1 = _below((_uniform(generators, rollout, 1)[0] + strata_K1) / K, n_B)[..., None]
    weight_KBC = ((group_BC == chosen_KB1) & count_BC) * (n_B[:, None] / K)
    return _noise(rollout, group_BC >= chosen_KB1, weight_KBC, count_BC)


def draw_block_bounds(rollout: Rollout, config: ObjectiveConfig, generators: Sequence[torch.Generator]) -> NoiseDraw:
    """Hide k of the n tokens of one block, k uniform in 1 ... n, and all blocks after it; weigh by n / k.

    Blocks of `config.block_length` tokens (0: the whole completion) are written from left to right, and which of a
    row's m blocks is read is uniform, so the weight has a factor m. The mean over `config.draws` canvases. The sum of
    the lower bound has the evidence lower bound of that order as its mean (SPG, arXiv 2510.09541, section 3.3), for a
    sampler that reads the whole canvas (`rollout.block_cache: false`).
    """
    K, (_, C) = config.draws, rollout.completion_mask_BC.shape
    mask_BC = rollout.completion_mask_BC
    block_C = torch.arange(C, device=mask_BC.device) // (config.block_length or C)
    m_B1 = torch.where(mask_BC, block_C, 0).amax(1, keepdim=True) + 1
    chosen_KB1 = _below(_uniform(generators, rollout, K)[..., None], m_B1)
    inside_KBC = (block_C == chosen_KB1) & mask_BC
    n_KB1 = inside_KBC.sum(-1, keepdim=True)
    k_KB1 = 1 + _below(_uniform(generators, rollout, K)[..., None], n_KB1)
    u_KBC = _uniform(generators, rollout, K, C).masked_fill(~inside_KBC, 2.0)
    part_KBC = (_rank(u_KBC, mask_BC) < k_KB1) & inside_KBC
    hidden_KBC = part_KBC | (block_C > chosen_KB1) | ~mask_BC
    return _noise(rollout, hidden_KBC, part_KBC * (m_B1 * n_KB1) / (k_KB1 * K))


# -------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def masked_nll(
    logp: LogpFn, rollout: Rollout, generators: Sequence[torch.Generator], mask_id: int
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood (nats) of hidden completion tokens and their number, both scalars.

    Hides the text's tokens at rates .25, .5 and .75. With the adapter off this is how likely the frozen base finds the
    text. One generator a row; equal generator states give equal noise.
    """
    C, mask_BC = rollout.completion_mask_BC.shape[1], rollout.completion_mask_BC
    total, count = (torch.zeros((), device=mask_BC.device) for _ in range(2))
    for rate in (0.25, 0.5, 0.75):
        at_BC = (_uniform(generators, rollout, 1, C)[0] < rate) & mask_BC
        # What follows the end token is not part of the text and must leak nothing: hide it too.
        noise = _noise(rollout, (at_BC | ~mask_BC)[None], at_BC.float()[None])
        total -= on_canvas(only_logp(logp), rollout, noise, 0, mask_id)["logp"].sum()
        count += at_BC.sum()
    return total, count


ESTIMATORS: dict[str, Estimator] = {
    "one_step": Estimator(draw_one_step),
    "elbo": Estimator(draw_elbo, level="sequence"),
    "coupled": Estimator(draw_coupled),
    "quadrature": Estimator(draw_quadrature, level="sequence"),
    "sequence_elbo": Estimator(draw_sequence_elbo, level="sequence"),
    "trajectory": Estimator(draw_trajectory, as_sampled=True),
    "trajectory_sampled": Estimator(draw_trajectory_sampled, level="sequence", as_sampled=True),
    "block_bounds": Estimator(draw_block_bounds, level="sequence", estimate=bounds),
}
