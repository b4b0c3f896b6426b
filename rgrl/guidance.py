"""Steer a denoising step's logits towards reward (EntRGi, arXiv 2602.05000, section 3).

The reward model reads a blend of the soft embedding of each hidden position and the embedding of one
sampled token; how much of each is set per position by the entropy of the policy there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rgrl.config import GuidanceConfig, RolloutConfig
from rgrl.sampling import Support, largest, row_blocks, support_of

# response_ACD, attention_AC, which of the B rows these A are -> r_A
RewardFromEmbeddings = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Guide:
    """What guidance needs besides the policy: a reward of embedded responses and the matching table."""

    reward: RewardFromEmbeddings
    embedding_VD: Tensor
    config: GuidanceConfig
    attend_eos: bool = False


def shown_to_reward(token_BC: Tensor, is_end: Callable[[Tensor], Tensor], attend_eos: bool) -> Tensor:
    """attention_BC: positions before the first end token; with `attend_eos` that token too."""
    ended_BC = is_end(token_BC).long().cumsum(1)
    return (ended_BC == 0) | ((ended_BC == 1) & is_end(token_BC)) if attend_eos else ended_BC == 0


def normalised_entropy(logits_NV: Tensor, V: int) -> Tensor:
    """w_N = H(softmax(logits)) / log V in 0 ... 1, of the untempered distribution."""
    w_N = logits_NV.new_empty(len(logits_NV))
    for rows in row_blocks(logits_NV):
        # H = sum p (log Z - z), with z counted from the largest logit; -inf z would make 0 * inf of a p of 0.
        z_nV = (logits_NV[rows] - logits_NV[rows].amax(-1, keepdim=True)).clamp_(min=-1e4)
        p_nV = z_nV.softmax(-1)
        w_N[rows] = -torch.log(p_nV.amax(-1)) - z_nV.mul_(p_nV).sum(-1)
    return w_N / math.log(V)


@torch.no_grad()
def guide(
    logits_NV: Tensor,
    support: Support,
    completion_BC: Tensor,
    hidden_N: Tensor,
    rows_B: Tensor,
    guidance: Guide,
    rollout: RolloutConfig,
    is_end: Callable[[Tensor], Tensor],
    u_MN: Tensor,
    weight: Callable[[Tensor, int], Tensor] = normalised_entropy,
) -> tuple[Tensor | None, Tensor]:
    """Steer `logits_NV` in place by M ascent steps on the summed reward.

    Returns the first step's w_N (`entrgi` only), and how many gradients, of the N at each ascent step, were not finite
    and left their logits as they were.

    They are the policy's at the places `hidden_N` of the flattened `completion_BC`, `support` is what it would
    sample from there, `rows_B` says which of the reward's rows these are, and `u_MN` (uniform) picks the hard
    tokens. Each step is Adam with fresh state (b1 0.9, b2 0.999, eps 1e-8), rate `config.eta`. Tokens that the
    policy scores -inf stay impossible. `weight` gives w_N from logits; only `entrgi` asks it.

    Beside the logits this holds a quarter of a tensor of their size, and Adam's two moments where M > 1. With
    `config.top_n` all of this is about the n most likely tokens of each position, as if there were no others.
    """
    config, table_VD, tau = guidance.config, guidance.embedding_VD, rollout.temperature
    V, D = table_VD.shape
    phi_NV, token_NV = logits_NV, None
    if 0 < config.top_n < V:
        phi_NV, token_NV = largest(logits_NV, config.top_n)
        table_NVD = table_VD[token_NV]
    # The probabilities, and after the reward model was read the gradient, of some rows at a time (enough of them that
    # reading the table for each piece costs nothing); in the table's type, as they meet it.
    size = max(128, -(-len(phi_NV) // 4))
    pieces = [slice(i, i + size) for i in range(0, len(phi_NV), size)]
    scratch_nV = torch.empty_like(phi_NV[:size], dtype=table_VD.dtype)
    soft_ND = table_VD.new_empty(len(phi_NV), D)
    moments = [torch.zeros_like(phi_NV) for _ in range(2 if config.steps > 1 else 0)]
    known_BCD = table_VD[completion_BC.flatten().index_fill(0, hidden_N, 0)].view(*completion_BC.shape, D)
    first_w_N, broken = None, torch.zeros((), device=phi_NV.device)
    for m in range(config.steps):
        if m > 0:
            support = support_of(phi_NV, tau, rollout.top_k, rollout.top_p).renamed(token_NV)
        for piece in pieces:
            phi_nV = phi_NV[piece]
            p_nV = scratch_nV[: len(phi_nV)]
            for rows in row_blocks(phi_nV):
                p_nV[rows] = (phi_nV[rows] / tau).softmax(-1)
            soft_ND[piece] = p_nV @ table_VD if token_NV is None else (p_nV[:, None] @ table_NVD[piece])[:, 0]
        blend_ND = soft_ND
        if config.kind != "expectation":
            hard_ND = table_VD[support.token(support.pick(u_MN[m]))]
            w_N1: float | Tensor = 1.0
            if config.kind == "entrgi":
                w_N = weight(phi_NV, V)
                first_w_N = w_N if m == 0 else first_w_N
                w_N1 = w_N[:, None].to(soft_ND.dtype)
            blend_ND = soft_ND + w_N1 * (hard_ND - soft_ND)
        likely_BC = completion_BC.flatten().scatter(0, hidden_N, support.best()).view_as(completion_BC)
        # The straight-through blend passes the gradient to the soft embedding unchanged, so the graph starts here.
        with torch.enable_grad():
            blend_ND = blend_ND.detach().requires_grad_()
            response_BCD = known_BCD.flatten(0, 1).index_put((hidden_N,), blend_ND).view_as(known_BCD)
            shown_BC = shown_to_reward(likely_BC, is_end, guidance.attend_eos)
            reward_B = guidance.reward(response_BCD, shown_BC, rows_B)
            (g_ND,) = torch.autograd.grad(reward_B.sum(), blend_ND)
        finite_N1 = g_ND.isfinite().all(-1, keepdim=True)
        g_ND = torch.where(finite_N1, g_ND / tau, 0.0)
        broken += (~finite_N1).sum()
        for piece in pieces:
            phi_nV = phi_NV[piece]
            g_nV = scratch_nV[: len(phi_nV)]
            if token_NV is None:
                torch.mm(g_ND[piece], table_VD.T, out=g_nV)
            else:
                g_nV.copy_((table_NVD[piece] @ g_ND[piece][..., None])[..., 0])
            moments_nV = [moment_NV[piece] for moment_NV in moments]
            for rows in row_blocks(phi_nV):
                ascend(phi_nV[rows], g_nV[rows], [moment_nV[rows] for moment_nV in moments_nV], m, config.eta, tau)
    if token_NV is not None:
        logits_NV.scatter_(1, token_NV, phi_NV)
    return first_w_N, broken


def ascend(phi_nV: Tensor, g_nV: Tensor, moments: list[Tensor], m: int, eta: float, tau: float) -> None:
    """Adam step `m` (from 0) on some rows of the logits, in place. Uses up `g_nV`, the gradient of softmax(phi / tau).

    `moments` are the first and the second one, or nothing where there is only one step.
    """
    # The gradient of the softmax; its probabilities once more, which is cheaper than keeping them.
    p_nV = (phi_nV / tau).softmax(-1)
    g_nV = g_nV.to(p_nV.dtype).mul_(p_nV)
    g_nV.sub_(p_nV.mul_(g_nV.sum(-1, keepdim=True)))
    if not moments:  # Adam's first step from fresh state in closed form
        g_nV.div_(g_nV.abs().add_(1e-8))
    else:
        first_nV, second_nV = moments
        first_nV.lerp_(g_nV, 0.1)
        second_nV.mul_(0.999).addcmul_(g_nV, g_nV, value=0.001)
        scale_nV = second_nV.div(1 - 0.999 ** (m + 1)).sqrt_().add_(1e-8)
        g_nV = torch.div(first_nV, scale_nV.mul_(1 - 0.9 ** (m + 1)), out=scale_nV)
    phi_nV.add_(g_nV, alpha=eta)
