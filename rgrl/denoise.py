"""The one masked-canvas unmasking loop: prompts in, completions and the log-probability of each choice out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgrl.config import RolloutConfig
from rgrl.guidance import Guide, guide
from rgrl.sampling import Support, draw_uniform, support_of
from rgrl.types import PrefixCache, Rollout

# canvas_BL, attention_BL, at_N (places in the flattened canvas), a PrefixCache with `block_length` -> logits_NV, which
# guidance writes to; as `Policy.logits`
LogitsFn = Callable[..., Tensor]


@dataclass(frozen=True)
class RolloutNoise:
    """All random numbers of a rollout, uniform, drawn once as data: row b's depend on nothing but its generator."""

    token_BTC: Tensor  # picks the tokens
    order_BTC: Tensor  # ranks the positions: `origin` and the position temperature
    hard_BTMC: Tensor  # picks the hard tokens of guidance

    @staticmethod
    def draw(generators: Sequence[torch.Generator], T: int, C: int, M: int) -> "RolloutNoise":
        """One generator a row. Guided and unguided rollouts (M = 0) share token and order noise."""
        draws = [[draw_uniform(shape, g) for shape in ((T, C), (T, C), (T, M, C))] for g in generators]
        return RolloutNoise(*(torch.stack(parts) for parts in zip(*draws, strict=True)))

    def rows(self, rows_A: Tensor) -> "RolloutNoise":
        return RolloutNoise(*(noise[rows_A] for noise in vars(self).values()))

    def to(self, device: torch.device) -> "RolloutNoise":
        return RolloutNoise(*(noise.to(device) for noise in vars(self).values()))


@dataclass
class DenoiseStats:
    """What a rollout saw, kept as tensors so that the loop never waits for the device."""

    entropy: list[Tensor] = field(default_factory=list)  # of the policy's own sampling, summed over committed tokens
    committed: list[Tensor] = field(default_factory=list)  # how many those are, by step
    changed: list[Tensor] = field(default_factory=list)  # how many of them guidance gave another most likely token
    guided: list[Tensor] = field(default_factory=list)  # how many tokens the steps that were guided committed
    broken: list[Tensor] = field(default_factory=list)  # how many of their gradients were not finite
    # By quarter of the denoising steps: the entropy weight w summed over hidden positions, and how many those are.
    weight: dict[int, list[tuple[Tensor, int]]] = field(default_factory=lambda: {q: [] for q in (1, 2, 3, 4)})


def commit_schedule(C: int, T: int) -> list[int]:
    """How many tokens each of T steps commits: the masked share falls linearly from 1 to 0; they sum to C."""
    left = [C - (C * t) // T for t in range(T + 1)]
    return [left[t] - left[t + 1] for t in range(T)]


def write_schedule(C: int, T: int, block: int) -> list[tuple[int, int, int, int]]:
    """For each of T steps: the block `first` ... `end` - 1 it writes in, how many places are hidden there, how many go.

    Blocks of `block` tokens from left to right share the steps; 0 means one block of all C.
    """
    block = block or C
    n, plan = C // block, []
    for i in range(n):
        left = block
        for k in commit_schedule(block, T * (i + 1) // n - T * i // n):
            plan.append((i * block, (i + 1) * block, left, k))
            left -= k
    return plan


def confidence_of(rule: str, support: Support, token_N: Tensor, order_N: Tensor) -> Tensor:
    """How sure the sampler is of each position, confidence_N; higher is committed first.

    `entropy`: minus the entropy of `support` in nats. `maskgit_plus`: the probability of `token_N`.
    `topk_margin`: the best probability minus the second. `origin`: `order_N`, random.
    """
    if rule == "origin":
        return order_N
    if rule == "maskgit_plus":
        return support.logp(token_N).exp()
    if rule == "topk_margin":
        best_N2 = support.logp_NK.topk(2, dim=-1).values.exp()
        return best_N2[:, 0] - best_N2[:, 1]
    return -support.entropy()


@torch.no_grad()
def denoise(
    logits: LogitsFn,
    prompt_BL: Tensor,
    prompt_attention_BL: Tensor,
    mask_id: int,
    is_end: Callable[[Tensor], Tensor],
    config: RolloutConfig,
    noise: RolloutNoise,
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
    C, L = config.max_completion_length, width + config.max_completion_length
    device = prompt_BL.device
    noise = noise.to(device)
    canvas_BL = torch.cat([prompt_BL, torch.full((B, C), mask_id, device=device)], 1)
    attention_BL = torch.cat([prompt_attention_BL, torch.ones(B, C, dtype=torch.bool, device=device)], 1)
    completion_BC = canvas_BL[:, width:]  # a view: writing to it writes the canvas
    masked_BC = torch.ones(B, C, dtype=torch.bool, device=device)
    step_BC = torch.full((B, C), config.steps, device=device)
    behaviour_BC = torch.zeros(B, C, device=device)
    policy_BC = torch.zeros(B, C, device=device)
    # The canvases of a group are identical until their first tokens, so the first step reads one of each.
    row_U, group_B = first_occurrences(torch.cat([canvas_BL, attention_BL], 1))
    rows_A = torch.arange(B, device=device)  # the rows that are still written
    prefix = PrefixCache(0)
    # Asking a GPU what it has found makes it wait, so there rows leave only where the option asks anyway.
    look = device.type == "cpu" or config.commit_above < 1
    steered = guidance is not None and guidance.config.kind != "none"
    for t, (first, end, left, k) in enumerate(write_schedule(C, config.steps, config.block_length)):
        if k == 0:
            continue
        N = len(rows_A) * left  # known without asking, if every row hides `left`
        if look and t > 0:
            masked_BC &= unfinished(completion_BC, masked_BC, is_end)[:, None]
            keep_A = masked_BC[rows_A].any(1)
            if not keep_A.all():
                rows_A, prefix = rows_A[keep_A], prefix.rows(keep_A)
            N = int(masked_BC[:, :end].sum())
            if N == 0:
                continue
        hidden_N = masked_BC[rows_A, :end].flatten().sort(descending=True, stable=True).indices[:N]
        row_N, place_N = hidden_N // end, hidden_N % end
        flat_N = rows_A[row_N] * C + place_N  # in the completions of all rows
        if t == 0 and len(row_U) < B:
            at_UC = torch.arange(len(row_U), device=device)[:, None] * L + torch.arange(
                width, width + end, device=device
            )
            logits_NV = logits(canvas_BL[row_U], attention_BL[row_U], at_UC.flatten())
            logits_NV = logits_NV.unflatten(0, at_UC.shape)[group_B].flatten(0, 1)
        elif config.block_length:
            if left == end - first or t == 1:  # a new block, or the first reading of every row
                prefix = PrefixCache(width + first - 1)  # the state before the block scores its first token
            at_N = row_N * L + width + place_N
            logits_NV = logits(canvas_BL[rows_A], attention_BL[rows_A], at_N, prefix)
        else:
            logits_NV = logits(canvas_BL[rows_A], attention_BL[rows_A], row_N * L + width + place_N)
        own = guided = support_of(logits_NV, config.temperature, config.top_k, config.top_p)
        w_N, steer_now = None, steered and t % guidance.config.every == 0
        if steer_now:
            u_MN = noise.hard_BTMC[:, t].transpose(0, 1).flatten(1)[:, flat_N]
            w_N, broken = guide(
                logits_NV, own, completion_BC[rows_A, :end], hidden_N, rows_A, guidance, config, is_end, u_MN
            )
            if guidance.config.support == "policy":
                guided = own.steered(logits_NV, config.temperature)
            else:
                guided = support_of(logits_NV, config.temperature, config.top_k, config.top_p)
        token_N = guided.token(guided.pick(noise.token_BTC[:, t].flatten()[flat_N]))
        order_N = noise.order_BTC[:, t].flatten()[flat_N]
        read = guided if config.confidence_from == "guided" else own
        confidence_N = confidence_of(config.confidence, read, token_N, order_N)
        if config.position_temperature > 0:
            confidence_N = confidence_N - config.position_temperature * torch.log(-torch.log(order_N))
        if config.defer_eos:
            confidence_N = confidence_N.masked_fill(is_end(token_N), -1e30)

        confidence_BC = spread(confidence_N, flat_N, B, C, float("-inf"))
        commit_BC = torch.zeros_like(masked_BC).scatter_(1, confidence_BC.topk(k, dim=-1).indices, True)
        if config.commit_above < 1:
            commit_BC |= spread(read.logp(read.best()).exp() > config.commit_above, flat_N, B, C, False)
        commit_BC &= confidence_BC > float("-inf")  # a row may hide fewer than k
        chosen_N = commit_BC.flatten()[flat_N]
        for record_BC, value_N in (
            (completion_BC, token_N),
            (behaviour_BC, guided.logp(token_N)),
            (policy_BC, own.logp(token_N)),
        ):
            record_BC.copy_(torch.where(commit_BC, spread(value_N, flat_N, B, C, 0), record_BC))
        step_BC.masked_fill_(commit_BC, t)
        masked_BC &= ~commit_BC
        if stats is not None:
            stats.committed.append(chosen_N.sum())
            stats.entropy.append(torch.where(chosen_N, own.entropy(), 0.0).sum())
            if steer_now:
                stats.changed.append(((guided.best() != own.best()) & chosen_N).sum())
                stats.guided.append(chosen_N.sum())
                stats.broken.append(broken)
            if w_N is not None:
                stats.weight[1 + 4 * t // config.steps].append((w_N.sum(), len(w_N)))
    is_end_BC = is_end(completion_BC)
    # What a finished row left open comes after its end token, which fills it.
    first_end_B1 = completion_BC.gather(1, is_end_BC.byte().argmax(1, keepdim=True))
    completion_BC.copy_(torch.where(completion_BC == mask_id, first_end_B1, completion_BC))
    ended_BC = is_end_BC.long().cumsum(1)
    return Rollout(
        canvas_BL=canvas_BL,
        attention_BL=attention_BL,
        completion_mask_BC=(ended_BC - is_end_BC.long()) == 0,
        unmask_step_BC=step_BC,
        behaviour_logp_BC=behaviour_BC,
        policy_logp_BC=policy_BC,
    )


def spread(value_N: Tensor, flat_N: Tensor, B: int, C: int, elsewhere: float) -> Tensor:
    """value_BC, `elsewhere` where `flat_N` names no place."""
    return value_N.new_full((B * C,), elsewhere).scatter_(0, flat_N, value_N).view(B, C)


def first_occurrences(rows_BX: Tensor) -> tuple[Tensor, Tensor]:
    """row_U, the first of each set of equal rows, and group_B, which of those each row equals. Reads the device."""
    rows = [tuple(row) for row in rows_BX.tolist()]
    first = {row: b for b, row in reversed(list(enumerate(rows)))}
    group = {row: u for u, row in enumerate(sorted(first, key=first.__getitem__))}
    row_U = torch.tensor(sorted(first.values()), device=rows_BX.device)
    return row_U, torch.tensor([group[row] for row in rows], device=rows_BX.device)


def unfinished(completion_BC: Tensor, masked_BC: Tensor, is_end: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows (bool, B) that hide a token before their first end token; what comes after it doesn't count."""
    ended_BC = (is_end(completion_BC) & ~masked_BC).cumsum(1) > 0
    return (masked_BC & ~ended_BC).any(1)
