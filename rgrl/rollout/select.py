"""Which hidden positions a denoising step commits: the confidence rules, and the choice of the k most confident.

At low temperature the nucleus leaves one token at most positions, and their confidences are equal. Of equally confident
positions the one comes first whose best token the policy finds more likely before temperature and nucleus
(`certainty`), then the leftmost. As the temperature falls this becomes LLaDA's low-confidence remasking (arXiv
2502.09992). It is the same on every device, but for rounding of the logits themselves, and reads neither sampled
tokens nor guided logits, which `rgrl.algo.corrections.exact` relies on.

To add a rule, write a function (support, token_N, order_N) -> confidence_N, and name it in `CONFIDENCE` and in
`RolloutConfig.confidence`; in `IGNORES_SAMPLES` too if it ignores `token_N`, else no correction for guidance is exact.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rgrl.config import RolloutConfig
from rgrl.rollout.sampling import Support, row_blocks


def negative_entropy(support: Support, token_N: Tensor, order_N: Tensor) -> Tensor:
    """Minus the entropy of the sampling distribution, nats."""
    return -support.entropy()


def sampled_probability(support: Support, token_N: Tensor, order_N: Tensor) -> Tensor:
    """The probability of the sampled token (MaskGIT, arXiv 2202.04200)."""
    return support.logp(token_N).exp()


def top_margin(support: Support, token_N: Tensor, order_N: Tensor) -> Tensor:
    """The largest probability minus the second largest."""
    best_N2 = support.logp_NK.topk(min(2, support.logp_NK.shape[1]), dim=-1).values.exp()
    return best_N2[:, 0] - best_N2[:, 1:].sum(1)  # of one candidate: 1


def random_order(support: Support, token_N: Tensor, order_N: Tensor) -> Tensor:
    """The uniform random numbers, unchanged."""
    return order_N


CONFIDENCE: dict[str, Callable[[Support, Tensor, Tensor], Tensor]] = {
    "entropy": negative_entropy,
    "maskgit_plus": sampled_probability,
    "topk_margin": top_margin,
    "origin": random_order,
}
# Rules whose order does not depend on the sampled tokens (`rgrl.algo.corrections.exact`).
IGNORES_SAMPLES = frozenset({"entropy", "topk_margin", "origin"})


def confidence(
    support: Support, token_N: Tensor, order_N: Tensor, config: RolloutConfig, is_end: Callable[[Tensor], Tensor]
) -> Tensor:
    """confidence_N of each position; higher is committed first.

    `support` is the sampling distribution, `token_N` the sampled tokens, `order_N` uniform random numbers. Adds Gumbel
    noise scaled by `config.position_temperature`, and puts end tokens last with `config.defer_eos`.
    """
    confidence_N = CONFIDENCE[config.confidence](support, token_N, order_N)
    if config.position_temperature > 0:
        confidence_N = confidence_N - config.position_temperature * torch.log(-torch.log(order_N))
    if config.defer_eos:
        confidence_N = confidence_N.masked_fill(is_end(token_N), -1e30)
    return confidence_N


def certainty(logits_NV: Tensor, own: Support) -> Tensor:
    """The policy's log-odds of its best token at each position, in nats, before temperature and nucleus.

    Against the other candidates of the top-k, which costs nothing, or with `top_k` 0 or 1 against all other tokens.
    Log-odds, because a probability near 1 would be rounded and tie again. `own` is the support of `logits_NV`.
    """
    kept_NK = logits_NV if own.token_NK is None or own.token_NK.shape[1] == 1 else logits_NV.gather(1, own.token_NK)
    odds_N = kept_NK.new_empty(len(kept_NK))
    for rows in row_blocks(kept_NK):
        best_n1, slot_n1 = kept_NK[rows].max(-1, keepdim=True)
        odds_N[rows] = best_n1[:, 0] - kept_NK[rows].scatter(1, slot_n1, float("-inf")).logsumexp(-1)
    return odds_N


def most_confident(confidence_BC: Tensor, certainty_BC: Tensor, k: int, also_BC: Tensor | None = None) -> Tensor:
    """commit_BC (bool): the k most confident places of each row, and those of `also_BC`.

    Of equally confident places first the most certain, then the leftmost. Places that are not hidden have confidence
    -inf and are never chosen, so a row that hides fewer than k commits all.
    """
    hidden_BC = confidence_BC > float("-inf")
    # Stable sorts, the last key first: each device's `topk` has an order of its own for equal numbers.
    order_BC = certainty_BC.sort(dim=1, descending=True, stable=True).indices
    confident_BC = confidence_BC.gather(1, order_BC).sort(dim=1, descending=True, stable=True).indices
    commit_BC = torch.zeros_like(hidden_BC).scatter_(1, order_BC.gather(1, confident_BC[:, :k]), True)
    if also_BC is not None:
        commit_BC |= also_BC
    return commit_BC & hidden_BC


def spread(value_N: Tensor, flat_N: Tensor, B: int, C: int, elsewhere: float) -> Tensor:
    """value_BC: `value_N` at the places `flat_N` of the flattened B x C, `elsewhere` at all others."""
    return value_N.new_full((B * C,), elsewhere).scatter_(0, flat_N, value_N).view(B, C)
