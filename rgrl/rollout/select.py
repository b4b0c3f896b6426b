"""Which hidden positions a denoising step commits: the confidence rules, and the choice of the k most confident.

To add a rule, write a function (support, token_N, order_N) -> confidence_N, and name it in `CONFIDENCE` and in
`RolloutConfig.confidence`; in `IGNORES_SAMPLES` too if it ignores `token_N`, else no correction for guidance is exact.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rgrl.config import RolloutConfig
from rgrl.rollout.sampling import Support


def negative_entropy(support: Support, token_N: Tensor, order_N: Tensor) -> Tensor:
    """Minus the entropy of the sampling distribution, nats."""
    return -support.entropy()


def sampled_probability(support: Support, token_N: Tensor, order_N: Tensor) -> Tensor:
    """The probability of the sampled token (MaskGIT, arXiv 2202.04200)."""
    return support.logp(token_N).exp()


def top_margin(support: Support, token_N: Tensor, order_N: Tensor) -> Tensor:
    """The largest probability minus the second largest."""
    best_N2 = support.logp_NK.topk(2, dim=-1).values.exp()
    return best_N2[:, 0] - best_N2[:, 1]


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


def most_confident(confidence_BC: Tensor, k: int, also_BC: Tensor | None = None) -> Tensor:
    """commit_BC (bool): the k most confident places of each row, and those of `also_BC`.

    Places that are not hidden have confidence -inf and are never chosen, so a row that hides fewer than k commits all.
    """
    hidden_BC = confidence_BC > float("-inf")
    commit_BC = torch.zeros_like(hidden_BC).scatter_(1, confidence_BC.topk(k, dim=-1).indices, True)
    if also_BC is not None:
        commit_BC |= also_BC
    return commit_BC & hidden_BC


def spread(value_N: Tensor, flat_N: Tensor, B: int, C: int, elsewhere: float) -> Tensor:
    """value_BC: `value_N` at the places `flat_N` of the flattened B x C, `elsewhere` at all others."""
    return value_N.new_full((B * C,), elsewhere).scatter_(0, flat_N, value_N).view(B, C)
