"""Steer a denoising step's logits towards reward (EntRGi, arXiv 2602.05000, section 3).

The reward model sees a blend of the soft embedding of each hidden position and the embedding of one sampled token;
the policy's entropy sets the blend at each position.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgrl.config import Config, GuidanceConfig, RolloutConfig
from rgrl.rollout.sampling import Support, drawn_from, largest, row_blocks, scale_of, support_of
from rgrl.types import Prompts

# response_ACD, attention_AC (bool), which of the prompts these A rows answer -> r_A, float32, differentiable
RewardFromEmbeddings = Callable[[Tensor, Tensor, Tensor], Tensor]


def normalised_entropy(logits_NV: Tensor, V: int) -> Tensor:
    """w_N = H(softmax(logits)) / log V in 0 ... 1, of the untempered distribution."""
    w_N = logits_NV.new_empty(len(logits_NV))
    for rows in row_blocks(logits_NV):
        # H = sum p (log Z - z), with z counted from the largest logit; -inf z would make 0 * inf of a p of 0.
        z_nV = (logits_NV[rows] - logits_NV[rows].amax(-1, keepdim=True)).clamp_(min=-1e4)
        p_nV = z_nV.softmax(-1)
        w_N[rows] = -torch.log(p_nV.amax(-1)) - z_nV.mul_(p_nV).sum(-1)
    return w_N / math.log(V)


@dataclass(frozen=True)
class Guide:
    """A differentiable reward of completions of given prompts, its embeddings in the policy's vocabulary, and settings.

    `weight` gives w_N from logits_NV and V. Only the kind `entrgi` uses it. `unseen_V` (bool) are the tokens that a
    completion's text lacks, such as control tokens (None: there are none).
    """

    reward: RewardFromEmbeddings
    embedding_VD: Tensor
    config: GuidanceConfig
    attend_eos: bool = False
    unseen_V: Tensor | None = None
    weight: Callable[[Tensor, int], Tensor] = normalised_entropy

    def steers(self, t: int) -> bool:
        """Whether denoising step t is guided."""
        return self.config.kind != "none" and t % self.config.every == 0


@dataclass(frozen=True)
class Guidance:
    """A reward model and settings, from which each batch of prompts gets its `Guide`."""

    reward_for: Callable[[Prompts], RewardFromEmbeddings]
    embedding_VD: Tensor
    config: GuidanceConfig
    attend_eos: bool = False
    unseen_V: Tensor | None = None

    def guide(self, prompts: Prompts) -> Guide:
        """The guide for completions of `prompts`."""
        return Guide(self.reward_for(prompts), self.embedding_VD, self.config, self.attend_eos, self.unseen_V)


@dataclass(frozen=True)
class Hidden:
    """Completions with hidden positions, as a reward model is shown them."""

    completion_BC: Tensor  # int64; the tokens at hidden positions are never looked up
    hidden_N: Tensor  # positions in the flattened completion_BC
    rows_B: Tensor  # which of the guide's prompts the rows answer

    def known_embeddings(self, embedding_VD: Tensor) -> Tensor:
        """known_BCD: the embeddings of the tokens; arbitrary at hidden positions."""
        known_X = self.completion_BC.flatten().index_fill(0, self.hidden_N, 0)
        return embedding_VD[known_X].view(*self.completion_BC.shape, embedding_VD.shape[1])

    def with_tokens(self, token_N: Tensor) -> Tensor:
        """The completions (BC) with `token_N` at the hidden positions."""
        return self.completion_BC.flatten().scatter(0, self.hidden_N, token_N).view_as(self.completion_BC)


def shown_to_reward(
    token_BC: Tensor, is_end: Callable[[Tensor], Tensor], attend_eos: bool, unseen_V: Tensor | None = None
) -> Tensor:
    """attention_BC: positions before the first end token, without `unseen_V`; with `attend_eos` that token too."""
    ended_BC = is_end(token_BC).long().cumsum(1)
    shown_BC = ended_BC == 0
    if unseen_V is not None:
        shown_BC = shown_BC & ~unseen_V[token_BC]
    return shown_BC | ((ended_BC == 1) & is_end(token_BC)) if attend_eos else shown_BC


@dataclass(frozen=True)
class RewardGradient:
    """The reward of partly embedded completions, and its gradient with respect to the embeddings."""

    reward_B: Tensor
    g_ND: Tensor  # as it comes out, also where it is not finite
    finite_N: Tensor  # bool, all of a position's gradient is finite


def reward_gradient(
    guide: Guide, embedded_ND: Tensor, known_BCD: Tensor, hidden: Hidden, shown_BC: Tensor
) -> RewardGradient:
    """One forward and backward pass of the reward model: r_B and g_ND = d(sum of r_B) / d(embedded_ND).

    `embedded_ND` stands at the hidden positions, `known_BCD` (`Hidden.known_embeddings`) elsewhere, and `shown_BC`
    (bool) says which positions the reward model attends to. No graph is kept: the gradient is a constant of what
    follows.
    """
    with torch.enable_grad():
        leaf_ND = embedded_ND.detach().requires_grad_()
        response_BCD = known_BCD.flatten(0, 1).index_put((hidden.hidden_N,), leaf_ND).view_as(known_BCD)
        reward_B = guide.reward(response_BCD, shown_BC, hidden.rows_B)
        (g_ND,) = torch.autograd.grad(reward_B.sum(), leaf_ND)
    return RewardGradient(reward_B.detach(), g_ND, g_ND.isfinite().all(-1))


class Candidates:
    """The logits that guidance moves and the embeddings behind them: the whole vocabulary, or each position's n best.

    Beside the logits this holds a quarter of a tensor of their size, and Adam's two moments where M > 1.
    """

    def __init__(self, logits_NV: Tensor, guide: Guide, tau: float) -> None:
        config, self.table = guide.config, guide.embedding_VD
        self.phi_NV, self.token_NV, self.tau, self.eta = logits_NV, None, tau, config.eta
        if 0 < config.top_n < len(self.table):
            self.phi_NV, self.token_NV = largest(logits_NV, config.top_n)
            self.table = self.table[self.token_NV]  # N x n x D
        # Probabilities, and later the gradient, of some rows at a time (enough rows that loading the table for each
        # piece costs nothing), in the table's type.
        N = len(self.phi_NV)
        size = max(128, -(-N // 4))
        self.pieces = [slice(i, i + size) for i in range(0, N, size)]
        self.scratch_nV = torch.empty_like(self.phi_NV[:size], dtype=self.table.dtype)
        self.moments = [torch.zeros_like(self.phi_NV) for _ in range(2 if config.steps > 1 else 0)]

    def soft_embeddings(self) -> Tensor:
        """soft_ND: the expected embedding under softmax(phi / tau)."""
        soft_ND = self.table.new_empty(len(self.phi_NV), self.table.shape[-1])
        for piece in self.pieces:
            phi_nV = self.phi_NV[piece]
            p_nV = self.scratch_nV[: len(phi_nV)]
            for rows in row_blocks(phi_nV):
                p_nV[rows] = (phi_nV[rows] / self.tau).softmax(-1)
            if self.token_NV is None:
                soft_ND[piece] = p_nV @ self.table
            else:
                soft_ND[piece] = (p_nV[:, None] @ self.table[piece])[:, 0]
        return soft_ND

    def ascend(self, g_ND: Tensor, m: int) -> None:
        """Adam step m (from 0) along `g_ND`, the gradient with respect to the soft embeddings."""
        for piece in self.pieces:
            phi_nV = self.phi_NV[piece]
            g_nV = self.scratch_nV[: len(phi_nV)]
            if self.token_NV is None:
                torch.mm(g_ND[piece], self.table.T, out=g_nV)
            else:
                g_nV.copy_((self.table[piece] @ g_ND[piece][..., None])[..., 0])
            moments_nV = [moment_NV[piece] for moment_NV in self.moments]
            for rows in row_blocks(phi_nV):
                ascend(phi_nV[rows], g_nV[rows], [moment_nV[rows] for moment_nV in moments_nV], m, self.eta, self.tau)


@torch.no_grad()
def steer(
    logits_NV: Tensor,
    support: Support,
    hidden: Hidden,
    u_MN: Tensor,
    guide: Guide,
    sampler: RolloutConfig,
    is_end: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, Tensor]:
    """Steer `logits_NV` in place by M ascent steps on the summed reward.

    Returns the first step's w_N (`entrgi` only), and how many gradients (N at each ascent step) were not finite and
    left their logits unchanged.

    The logits are the policy's at the hidden positions, `support` is its sampling distribution there, and `u_MN`
    (uniform) picks the hard tokens (at temperature 0 the most likely ones). Each step is Adam with fresh state (b1 0.9,
    b2 0.999, eps 1e-8) at the rate `config.eta`. Tokens that the policy scores -inf stay impossible. With
    `config.top_n` all of this is about the n most likely tokens of each position, as if there were no others.
    """
    config, table_VD, tau = guide.config, guide.embedding_VD, scale_of(sampler)
    candidates = Candidates(logits_NV, guide, tau)
    known_BCD = hidden.known_embeddings(table_VD)
    first_w_N, broken = None, torch.zeros((), device=logits_NV.device)
    for m in range(config.steps):
        if m > 0:
            support = support_of(candidates.phi_NV, tau, sampler.top_k, sampler.top_p).renamed(candidates.token_NV)
        blend_ND = candidates.soft_embeddings()
        if config.kind != "expectation":
            drawn = drawn_from(support, sampler)
            hard_ND = table_VD[drawn.token(drawn.pick(u_MN[m]))]
            w_N1: float | Tensor = 1.0
            if config.kind == "entrgi":
                w_N = guide.weight(candidates.phi_NV, len(table_VD))
                first_w_N = w_N if m == 0 else first_w_N
                w_N1 = w_N[:, None].to(blend_ND.dtype)
            blend_ND = blend_ND + w_N1 * (hard_ND - blend_ND)
        shown_BC = shown_to_reward(hidden.with_tokens(support.best()), is_end, guide.attend_eos, guide.unseen_V)
        # The straight-through blend passes the gradient on to the soft embedding unchanged.
        found = reward_gradient(guide, blend_ND, known_BCD, hidden, shown_BC)
        candidates.ascend(torch.where(found.finite_N[:, None], found.g_ND / tau, 0.0), m)
        broken += (~found.finite_N).sum()
    if candidates.token_NV is not None:
        logits_NV.scatter_(1, candidates.token_NV, candidates.phi_NV)
    return first_w_N, broken


def ascend(phi_nV: Tensor, g_nV: Tensor, moments: list[Tensor], m: int, eta: float, tau: float) -> None:
    """Adam step `m` (from 0) on some rows of the logits, in place. Overwrites `g_nV`, the gradient of its softmax.

    `moments` are the first and the second one, or nothing where there is only one step.
    """
    # The gradient of the softmax. Computing its probabilities again is cheaper than keeping them.
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


def guidance_at(config: Config, step: int) -> GuidanceConfig:
    """The guidance settings of a training step: eta goes linearly from `eta` to `eta_final`, and 0 turns it off."""
    g, last = config.guidance, max(1, config.run.steps - 1)
    if g.eta_final is None:
        return g
    done = min(1.0, step / last)
    eta = (1 - done) * g.eta + done * g.eta_final
    return replace(g, eta=eta, kind=g.kind if eta > 0 else "none")
