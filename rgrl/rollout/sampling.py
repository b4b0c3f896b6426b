"""What a denoising step samples, and which positions it commits.

Tokens are drawn from logits truncated to the most likely ones, without sorting the vocabulary. Then each position has a
confidence, and the k most confident are committed. At low temperature the nucleus leaves one token at most positions,
and their confidences are equal. Of equally confident positions the one comes first whose best token the policy finds
more likely before temperature and nucleus (`certainty`), then the leftmost. As the temperature falls this becomes
LLaDA's low-confidence remasking (arXiv 2502.09992). It is the same on every device, but for rounding of the logits
themselves, and reads neither sampled tokens nor guided logits, which `rgrl.algo.corrections.exact` relies on.

To add a confidence rule, write a function (support, token_N, order_N) -> confidence_N, and name it in `CONFIDENCE` and
in `RolloutConfig.confidence`; in `IGNORES_SAMPLES` too if it ignores `token_N`, else no correction for guidance is
exact.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rgrl.config import RolloutConfig

BLOCK = 64  # tokens represented by their largest logit in the first round of a top-k search


def row_blocks(x_NV: Tensor) -> Iterator[slice]:
    """Slices of rows to process one after another, so that temporary tensors stay small.

    On a CPU they fit its cache, which makes a pass over them several times faster; on a GPU a block is 256 MiB.
    """
    elements = 2**26 if x_NV.is_cuda else 2**19
    rows = max(1, elements // x_NV.shape[-1])
    return (slice(i, i + rows) for i in range(0, len(x_NV), rows))


@dataclass(frozen=True)
class Support:
    """The tempered and truncated distribution of each position over its K candidates."""

    logp_NK: Tensor  # nats; a row's probabilities sum to 1; -inf outside the nucleus
    token_NK: Tensor | None  # candidate k's token; None: all of them, in the order of their ids

    def best(self) -> Tensor:
        """The most likely token of each row."""
        return self.token(self.logp_NK.argmax(-1))

    def token(self, slot_N: Tensor) -> Tensor:
        """The token of candidate `slot_N` of each row."""
        return slot_N if self.token_NK is None else self.token_NK.gather(-1, slot_N[:, None])[:, 0]

    def logp(self, token_N: Tensor) -> Tensor:
        """Log-probability of one token per row in nats, -inf where it is no candidate."""
        if self.token_NK is None:
            return self.logp_NK.gather(-1, token_N[:, None])[:, 0]
        return self.logp_NK.masked_fill(self.token_NK != token_N[:, None], float("-inf")).amax(-1)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats."""
        return torch.cat([torch.special.entr(self.logp_NK[rows].exp()).sum(-1) for rows in row_blocks(self.logp_NK)])

    def pick(self, u_N: Tensor) -> Tensor:
        """One candidate per row, slot_N: the one at quantile `u_N`, as `draw_uniform` makes them. Exact."""
        p_NK = self.logp_NK.exp()
        cdf_NK = p_NK.cumsum(-1)
        # Rounding can make the cumulative sum decrease; a candidate of probability 0 must not be hit there.
        hit_NK = (cdf_NK > u_N.to(cdf_NK.dtype)[:, None] * cdf_NK[:, -1:]) & (p_NK > 0)
        return hit_NK.byte().argmax(-1)

    def greedy(self) -> "Support":
        """All probability on the most likely token of each row; of equally likely ones on the one with the least id."""
        tied_NK = self.logp_NK == self.logp_NK.amax(-1, keepdim=True)
        if self.token_NK is None:
            slot_N1 = tied_NK.byte().argmax(-1, keepdim=True)
        else:
            slot_N1 = self.token_NK.masked_fill(~tied_NK, torch.iinfo(torch.long).max).argmin(-1, keepdim=True)
        certain_NK = torch.full_like(self.logp_NK, float("-inf")).scatter_(-1, slot_N1, 0.0)
        return Support(certain_NK, self.token_NK)

    def steered(self, logits_NV: Tensor, temperature: float) -> "Support":
        """`softmax(logits / temperature)` over the candidates of this one, and no others."""
        kept_NK = logits_NV if self.token_NK is None else logits_NV.gather(-1, self.token_NK)
        kept_NK = (kept_NK / temperature).masked_fill(self.logp_NK == float("-inf"), float("-inf"))
        return Support(kept_NK.log_softmax(-1), self.token_NK)

    def renamed(self, token_NV: Tensor | None) -> "Support":
        """The same distribution where column v of the logits means token `token_NV[n, v]`."""
        if token_NV is None:
            return self
        return Support(self.logp_NK, token_NV if self.token_NK is None else token_NV.gather(1, self.token_NK))


def drawn_from(support: Support, config: RolloutConfig) -> Support:
    """What tokens are drawn from: the distribution itself, or with temperature 0 its most likely token alone."""
    return support if config.temperature > 0 else support.greedy()


def scale_of(config: RolloutConfig) -> float:
    """What logits are divided by: the temperature, and 1 where that is 0, which takes the most likely token.

    A greedy sampler still ranks positions by how sure they are, and guidance needs a distribution to move: those are of
    temperature 1, as in the samplers of Dream's and LLaDA's authors.
    """
    return config.temperature or 1.0


def draw_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform numbers strictly inside (0, 1), so that logarithms and quantiles stay finite."""
    return torch.rand(shape, generator=generator, device=generator.device).clamp_(1e-7, 1 - 1e-6)


def largest(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, sorted, and their columns: (values_NK, index_NK). Exact.

    The k largest lie in the k blocks with the largest maxima, so only those blocks are searched.
    """
    V = x_NV.shape[-1]
    blocks = V // BLOCK
    if blocks < 4 * k:  # the search would cover most of the row again
        return x_NV.topk(k, dim=-1)
    x_NnW = x_NV[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    block_NK = x_NnW.amax(-1).topk(k, dim=-1, sorted=False).indices
    candidates = x_NnW.gather(1, block_NK[..., None].expand(-1, -1, BLOCK)).flatten(1)
    if V > blocks * BLOCK:  # the rest of the row is too short for a block
        candidates = torch.cat([candidates, x_NV[:, blocks * BLOCK :]], 1)
    values_NK, slot_NK = candidates.topk(k, dim=-1)
    within_NK = block_NK.gather(1, (slot_NK // BLOCK).clamp(max=k - 1)) * BLOCK + slot_NK % BLOCK
    return values_NK, torch.where(slot_NK < k * BLOCK, within_NK, slot_NK + (blocks - k) * BLOCK)


def nucleus(p_NV: Tensor, top_p: float) -> Tensor:
    """Which tokens (bool, NV) are at least as likely as x, the largest x a row whose tokens hold `top_p` together.

    By bisection over the bit patterns of float32, which order positive numbers: 31 halvings find it exactly.
    """
    bits_NV = p_NV.float().view(torch.int32)
    low_N1 = torch.zeros_like(bits_NV[:, :1])  # holds
    high_N1 = torch.full_like(low_N1, 0x3F800001)  # just above 1: holds nothing
    for _ in range(31):
        middle_N1 = low_N1 + (high_N1 - low_N1) // 2
        enough_N1 = torch.where(bits_NV >= middle_N1, p_NV, 0.0).sum(-1, keepdim=True) >= top_p
        low_N1 = torch.where(enough_N1, middle_N1, low_N1)
        high_N1 = torch.where(enough_N1, high_N1, middle_N1)
    return bits_NV >= low_N1


def support_of(logits_NV: Tensor, temperature: float, top_k: int, top_p: float) -> Support:
    """The truncation of `softmax(logits / temperature)` in each row: the top-k, then the nucleus of what remains.

    The nucleus is the shortest list of tokens by falling probability that holds at least `top_p`. `top_k` 0 and
    `top_p` 1 keep everything. Of equal tokens at the edge of the top-k any may stay; at the edge of a nucleus
    without top-k all of them do.
    """
    V = logits_NV.shape[-1]
    if 0 < top_k < V:
        values_NK, token_NK = largest(logits_NV, top_k)
        scaled_NK = values_NK / temperature
        if top_p < 1:
            p_NK = scaled_NK.softmax(-1)
            scaled_NK = scaled_NK.masked_fill(p_NK.cumsum(-1) - p_NK >= top_p, float("-inf"))
        return Support(scaled_NK.log_softmax(-1), token_NK)
    logp_NV = torch.empty_like(logits_NV)
    for rows in row_blocks(logits_NV):
        scaled_nV = logits_NV[rows] / temperature
        if top_p < 1:
            scaled_nV.masked_fill_(~nucleus(scaled_nV.softmax(-1), top_p), float("-inf"))
        torch.log_softmax(scaled_nV, -1, out=logp_NV[rows])
    return Support(logp_NV, None)


def sampled_logp(logits_NV: Tensor, token_N: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Log-probability (nats) of one token per row under `support_of`, with gradient.

    A token outside the support is added to it, so that its log-probability is finite.
    """
    with torch.no_grad():
        support = support_of(logits_NV.detach(), temperature, top_k, top_p)
    token_N1 = token_N[:, None]
    own_N1 = logits_NV.gather(-1, token_N1) / temperature
    others_NK = logits_NV if support.token_NK is None else logits_NV.gather(-1, support.token_NK)
    tokens = torch.arange(others_NK.shape[1], device=token_N.device) if support.token_NK is None else support.token_NK
    cut_NK = (support.logp_NK == float("-inf")) | (tokens == token_N1)
    others_NK = (others_NK / temperature).masked_fill(cut_NK, float("-inf"))
    return own_N1[:, 0] - torch.cat([own_N1, others_NK], 1).logsumexp(-1)


# ------------------------------------------------------------------------------------------ positions to commit
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


def certainty(logits_NV: Tensor, support: Support) -> Tensor:
    """The policy's log-odds of its best token at each position, in nats, before temperature and nucleus.

    Against the other candidates of the top-k, which costs nothing, or with `top_k` 0 or 1 against all other tokens.
    Log-odds, because a probability near 1 would be rounded and tie again. `support` is that of `logits_NV`.
    """
    kept_NK = (
        logits_NV
        if support.token_NK is None or support.token_NK.shape[1] == 1
        else logits_NV.gather(1, support.token_NK)
    )
    odds_N = kept_NK.new_empty(len(kept_NK))
    for rows in row_blocks(kept_NK):
        best_n1, slot_n1 = kept_NK[rows].max(-1, keepdim=True)
        odds_N[rows] = best_n1[:, 0] - kept_NK[rows].scatter(1, slot_n1, float("-inf")).logsumexp(-1)
    return odds_N


def most_confident(confidence_BC: Tensor, certainty_BC: Tensor, k: int, also_BC: Tensor | None = None) -> Tensor:
    """commit_BC (bool): the k most confident positions of each row, and those of `also_BC`.

    Of equally confident positions first the most certain, then the leftmost. Positions that are not hidden have
    confidence
    -inf and are never chosen, so a row that hides fewer than k commits all.
    """
    hidden_BC = confidence_BC > float("-inf")
    # Stable sorts, the last key first: each device's `topk` orders equal numbers in another way.
    order_BC = certainty_BC.sort(dim=1, descending=True, stable=True).indices
    confident_BC = confidence_BC.gather(1, order_BC).sort(dim=1, descending=True, stable=True).indices
    commit_BC = torch.zeros_like(hidden_BC).scatter_(1, order_BC.gather(1, confident_BC[:, :k]), True)
    if also_BC is not None:
        commit_BC |= also_BC
    return commit_BC & hidden_BC


def spread(value_N: Tensor, flat_N: Tensor, B: int, C: int, elsewhere: float) -> Tensor:
    """value_BC: `value_N` at the positions `flat_N` of the flattened B x C, `elsewhere` at all others."""
    return value_N.new_full((B * C,), elsewhere).scatter_(0, flat_N, value_N).view(B, C)
