"""Steer a denoising step's logits towards reward (EntRGi, arXiv 2602.05000, section 3).

The reward model reads a blend of the soft embedding of each hidden position and the embedding of one
sampled token; how much of each is set per position by the entropy of the policy there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rgrl.config import GuidanceConfig, RolloutConfig

# response_BCD, attention_BC -> r_B
RewardFromEmbeddings = Callable[[Tensor, Tensor], Tensor]
NEGATIVE = -1e9  # stands for -inf where a gradient passes, since inf - inf is nan


def normalised_entropy(logits_NV: Tensor) -> Tensor:
    """w_N = H(softmax(logits)) / log V in 0 ... 1, of the untempered distribution."""
    p_NV = logits_NV.softmax(-1)
    return torch.special.entr(p_NV).sum(-1) / torch.log(torch.tensor(float(logits_NV.shape[-1])))


def truncate(logits_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with -inf outside the top-k, then outside the nucleus of what remains.

    The nucleus is the shortest prefix of the tokens by falling probability that holds at least `top_p`.
    `top_k` 0 and `top_p` 1 keep everything. Ties at the edge go to the lower rank of `torch.topk`.
    """
    V = logits_NV.shape[-1]
    if (top_k == 0 or top_k >= V) and top_p >= 1:
        return logits_NV
    k = min(top_k, V) if top_k else V
    kept_NK, index_NK = logits_NV.topk(k, dim=-1)  # sorted
    if top_p < 1:
        p_NK = kept_NK.softmax(-1)
        before_NK = p_NK.cumsum(-1) - p_NK
        kept_NK = kept_NK.masked_fill(before_NK >= top_p, float("-inf"))
    return torch.full_like(logits_NV, float("-inf")).scatter(-1, index_NK, kept_NK)


def sample(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row, x_N, by the Gumbel-max trick: exact, and no host synchronisation."""
    u_NV = torch.rand(logits_NV.shape, generator=generator, device=logits_NV.device, dtype=logits_NV.dtype)
    gumbel_NV = -torch.log(-torch.log(u_NV.clamp_(1e-20, 1 - 1e-7)))
    return (logits_NV + gumbel_NV).argmax(-1)


def shown_to_reward(token_BC: Tensor, is_end: Callable[[Tensor], Tensor], attend_eos: bool) -> Tensor:
    """attention_BC: positions before the first end token; with `attend_eos` that token too."""
    ended_BC = is_end(token_BC).long().cumsum(1)
    return (ended_BC == 0) | ((ended_BC == 1) & is_end(token_BC)) if attend_eos else ended_BC == 0


def guide(
    logits_NV: Tensor,
    completion_BC: Tensor,
    masked_BC: Tensor,
    reward: RewardFromEmbeddings,
    embedding_VD: Tensor,
    is_end: Callable[[Tensor], Tensor],
    config: GuidanceConfig,
    rollout: RolloutConfig,
    generator: torch.Generator,
    attend_eos: bool = False,
    weight: Callable[[Tensor], Tensor] = normalised_entropy,
) -> Tensor:
    """Guided logits_NV after M ascent steps on the summed reward; the input is not changed.

    `logits_NV` are the policy's at the `masked_BC` positions (row-major), `completion_BC` the tokens so far.
    Each step is Adam with fresh state (b1 0.9, b2 0.999, eps 1e-8), rate `config.eta`. Tokens that the policy
    scores -inf stay impossible. `weight` gives w_N from logits; only `entrgi` asks it.
    """
    if config.kind == "none":
        return logits_NV
    phi_NV = logits_NV.clamp(min=NEGATIVE)
    first_NV, second_NV = torch.zeros_like(phi_NV), torch.zeros_like(phi_NV)
    known_BCD = embedding_VD[completion_BC.masked_fill(masked_BC, 0)]
    for m in range(1, config.steps + 1):
        with torch.enable_grad():
            phi_NV = phi_NV.detach().requires_grad_()
            p_NV = (phi_NV / rollout.temperature).softmax(-1)
            blend_ND = p_NV.to(embedding_VD.dtype) @ embedding_VD
            if config.kind != "expectation":
                with torch.no_grad():
                    scaled_NV = truncate(phi_NV / rollout.temperature, rollout.top_k, rollout.top_p)
                    hard_ND = embedding_VD[sample(scaled_NV, generator)]
                    w_N1 = torch.ones_like(p_NV[:, :1]) if config.kind == "aps" else weight(phi_NV)[:, None]
                    shift_ND = w_N1.to(hard_ND.dtype) * (hard_ND - blend_ND)
                blend_ND = blend_ND + shift_ND
            response_BCD = known_BCD.masked_scatter(masked_BC[..., None], blend_ND)
            likely_BC = completion_BC.masked_scatter(masked_BC, phi_NV.detach().argmax(-1))
            total = reward(response_BCD, shown_to_reward(likely_BC, is_end, attend_eos)).sum()
            (g_NV,) = torch.autograd.grad(total, phi_NV)
        first_NV = 0.9 * first_NV + 0.1 * g_NV
        second_NV = 0.999 * second_NV + 0.001 * g_NV * g_NV
        step_NV = (first_NV / (1 - 0.9**m)) / ((second_NV / (1 - 0.999**m)).sqrt() + 1e-8)
        phi_NV = phi_NV.detach() + config.eta * step_NV
    return phi_NV.masked_fill(logits_NV == float("-inf"), float("-inf"))
