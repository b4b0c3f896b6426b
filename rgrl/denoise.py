"""The one masked-canvas unmasking loop: prompts in, completions and the log-probability of each choice out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgrl.config import GuidanceConfig, RolloutConfig
from rgrl.guidance import RewardFromEmbeddings, guide, sample, truncate
from rgrl.types import Rollout

# canvas_BL, attention_BL, at (bool BL) -> logits_NV
LogitsFn = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Guide:
    """What guidance needs besides the policy: a reward of embedded responses and the matching table."""

    reward: RewardFromEmbeddings
    embedding_VD: Tensor
    config: GuidanceConfig
    attend_eos: bool = False


@dataclass
class DenoiseStats:
    """Sums over committed tokens, kept as tensors so that the loop never waits for the device."""

    changed: list[Tensor] = field(default_factory=list)
    committed: list[Tensor] = field(default_factory=list)

    def changed_share(self) -> float:
        """Share of committed tokens that are not the ones the policy's own logits would have given."""
        return float(torch.stack(self.changed).sum() / torch.stack(self.committed).sum())


def commit_schedule(C: int, T: int) -> list[int]:
    """How many tokens each of T steps commits: the masked share falls linearly from 1 to 0; they sum to C."""
    left = [C - (C * t) // T for t in range(T + 1)]
    return [left[t] - left[t + 1] for t in range(T)]


def confidence_of(rule: str, logits_NV: Tensor, token_N: Tensor, generator: torch.Generator) -> Tensor:
    """How sure the sampler is of each position, confidence_N; higher is committed first.

    `logits_NV` are the tempered and truncated ones. `entropy`: minus the entropy in nats. `maskgit_plus`: the
    probability of the sampled token. `topk_margin`: the best probability minus the second. `origin`: random.
    """
    if rule == "origin":
        return torch.rand(token_N.shape, generator=generator, device=token_N.device)
    p_NV = logits_NV.softmax(-1)
    if rule == "maskgit_plus":
        return p_NV.gather(-1, token_N[:, None])[:, 0]
    if rule == "topk_margin":
        best_N2 = p_NV.topk(2, dim=-1).values
        return best_N2[:, 0] - best_N2[:, 1]
    return -torch.special.entr(p_NV).sum(-1)


def logp_of(logits_NV: Tensor, token_N: Tensor) -> Tensor:
    """Log-probability of one token per row, float32, nats."""
    return logits_NV.gather(-1, token_N[:, None])[:, 0] - logits_NV.logsumexp(-1)


@torch.no_grad()
def denoise(
    logits: LogitsFn,
    prompt_BL: Tensor,
    prompt_attention_BL: Tensor,
    mask_id: int,
    is_end: Callable[[Tensor], Tensor],
    config: RolloutConfig,
    generator: torch.Generator,
    guidance: Guide | None = None,
    stats: DenoiseStats | None = None,
) -> Rollout:
    """Unmask C tokens after each left-padded prompt in T steps (EntRGi, arXiv 2602.05000, algorithm 1).

    Each step reads the policy at the hidden positions, steers those logits if `guidance` is given, samples every
    hidden position and commits the k most confident of each row, k from the linear schedule. The rollout records
    for each token its step and its log-probability under the guided (behaviour) and the policy's own tempered,
    truncated distribution. With `confidence_from="policy"` the rule reads the policy's own logits.
    """
    B, width = prompt_BL.shape
    C = config.max_completion_length
    device = prompt_BL.device
    canvas_BL = torch.cat([prompt_BL, torch.full((B, C), mask_id, device=device)], 1)
    attention_BL = torch.cat([prompt_attention_BL, torch.ones(B, C, dtype=torch.bool, device=device)], 1)
    completion_BC = canvas_BL[:, width:]  # a view: writing to it writes the canvas
    masked_BC = torch.ones(B, C, dtype=torch.bool, device=device)
    step_BC = torch.zeros(B, C, dtype=torch.long, device=device)
    behaviour_BC = torch.zeros(B, C, device=device)
    policy_BC = torch.zeros(B, C, device=device)
    left = C
    for t, k in enumerate(commit_schedule(C, config.steps)):
        if k == 0:
            continue
        at_BL = torch.cat([torch.zeros_like(prompt_attention_BL), masked_BC], 1)
        own_NV = logits(canvas_BL, attention_BL, at_BL)
        guided_NV = own_NV
        if guidance is not None:
            guided_NV = guide(
                own_NV,
                completion_BC,
                masked_BC,
                guidance.reward,
                guidance.embedding_VD,
                is_end,
                guidance.config,
                config,
                generator,
                guidance.attend_eos,
            )
        own_NV = truncate(own_NV / config.temperature, config.top_k, config.top_p)
        steered = guidance is not None and guidance.config.kind != "none"
        guided_NV = truncate(guided_NV / config.temperature, config.top_k, config.top_p) if steered else own_NV
        # One uniform draw per position and token, so that unguided sampling differs from guided by the logits alone.
        token_N = sample(guided_NV, generator)
        confidence_N = confidence_of(
            config.confidence, guided_NV if config.confidence_from == "guided" else own_NV, token_N, generator
        )
        if config.position_temperature > 0:
            u_N = torch.rand(confidence_N.shape, generator=generator, device=device).clamp_(1e-20, 1 - 1e-7)
            confidence_N = confidence_N - config.position_temperature * torch.log(-torch.log(u_N))
        if config.defer_eos:
            confidence_N = confidence_N.masked_fill(is_end(token_N), -1e30)

        # Every row has the same number `left` of hidden positions, so N splits into rows.
        chosen_Bk = confidence_N.view(B, left).topk(k, dim=-1).indices
        place_Bk = masked_BC.nonzero_static(size=B * left)[:, 1].view(B, left).gather(1, chosen_Bk)
        logp_N, own_logp_N = logp_of(guided_NV, token_N), logp_of(own_NV, token_N)
        completion_BC.scatter_(1, place_Bk, token_N.view(B, left).gather(1, chosen_Bk))
        step_BC.scatter_(1, place_Bk, t)
        behaviour_BC.scatter_(1, place_Bk, logp_N.view(B, left).gather(1, chosen_Bk))
        policy_BC.scatter_(1, place_Bk, own_logp_N.view(B, left).gather(1, chosen_Bk))
        masked_BC.scatter_(1, place_Bk, False)
        left -= k
        if stats is not None and steered:
            changed_BN = (guided_NV.argmax(-1) != own_NV.argmax(-1)).view(B, -1).gather(1, chosen_Bk)
            stats.changed.append(changed_BN.sum())
            stats.committed.append(torch.tensor(changed_BN.numel(), device=device))
    ended_BC = is_end(completion_BC).long().cumsum(1)
    return Rollout(
        canvas_BL=canvas_BL,
        attention_BL=attention_BL,
        completion_mask_BC=(ended_BC - is_end(completion_BC).long()) == 0,
        unmask_step_BC=step_BC,
        behaviour_logp_BC=behaviour_BC,
        policy_logp_BC=policy_BC,
    )
