"""The one masked-canvas unmasking loop: prompts in, completions and the log-probabilities of their tokens out.

A step is four verbs: read the masked logits, steer them, choose positions, commit tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rgrl.config import RolloutConfig
from rgrl.rollout.guidance import Guide, Hidden, steer
from rgrl.rollout.sampling import (
    Support,
    certainty,
    confidence,
    draw_uniform,
    drawn_from,
    most_confident,
    scale_of,
    spread,
    support_of,
)
from rgrl.types import PrefixCache, Rollout


class DiffusionLM(Protocol):
    """What denoising needs of a policy. `rgrl.models.Policy` is one."""

    mask_id: int

    def logits(
        self, canvas_BL: Tensor, attention_BL: Tensor, at: Tensor, prefix: PrefixCache | None = None, /
    ) -> Tensor:
        """logits_NV, float32, at the positions `at` (int64) of the flattened canvas. Steering writes to them."""
        ...

    def is_end(self, ids: Tensor, /) -> Tensor:
        """True where a token ends the completion."""
        ...


class Window(NamedTuple):
    """One denoising step: it commits `commit` of the `hidden` tokens at positions `first` ... `end` - 1 of a row."""

    first: int
    end: int
    hidden: int
    commit: int


def commit_schedule(C: int, T: int) -> list[int]:
    """How many tokens each of T steps commits: the masked fraction falls linearly from 1 to 0; they sum to C."""
    left = [C - (C * t) // T for t in range(T + 1)]
    return [left[t] - left[t + 1] for t in range(T)]


def write_schedule(C: int, T: int, block: int) -> list[Window]:
    """The window of each of T steps. Blocks of `block` tokens from left to right share the steps; 0: one block of C."""
    block = block or C
    n, plan = C // block, []
    for i in range(n):
        hidden = block
        for commit in commit_schedule(block, T * (i + 1) // n - T * i // n):
            plan.append(Window(i * block, (i + 1) * block, hidden, commit))
            hidden -= commit
    return plan


@dataclass(frozen=True)
class RolloutNoise:
    """All random numbers of a rollout, uniform, drawn once as data. A row's numbers depend only on its generator."""

    token_BTC: Tensor  # picks the tokens
    order_BTC: Tensor  # ranks the positions: `origin` and the position temperature
    hard_BTMC: Tensor  # picks the hard tokens of guidance

    @staticmethod
    def draw(generators: Sequence[torch.Generator], T: int, C: int, M: int) -> "RolloutNoise":
        """One generator a row. Guided and unguided rollouts (M = 0) share token and order noise."""
        draws = [[draw_uniform(shape, g) for shape in ((T, C), (T, C), (T, M, C))] for g in generators]
        return RolloutNoise(*(torch.stack(rows) for rows in zip(*draws, strict=True)))

    def rows(self, rows_A: Tensor) -> "RolloutNoise":
        """The noise of some rows."""
        return RolloutNoise(*(noise[rows_A] for noise in vars(self).values()))

    def to(self, device: torch.device) -> "RolloutNoise":
        """The same numbers on `device`."""
        return RolloutNoise(*(noise.to(device) for noise in vars(self).values()))


@dataclass
class DenoiseStats:
    """What a rollout saw, kept as tensors so that the loop never waits for the device."""

    entropy: list[Tensor] = field(
        default_factory=list
    )  # of the policy's sampling distribution, summed over committed tokens
    committed: list[Tensor] = field(default_factory=list)  # number of tokens committed, by step
    changed: list[Tensor] = field(default_factory=list)  # of those, how many got another most likely token by guidance
    guided: list[Tensor] = field(default_factory=list)  # number of tokens committed by guided steps
    broken: list[Tensor] = field(default_factory=list)  # number of their gradients that were not finite
    # By quarter of the denoising steps: the entropy weight w summed over hidden positions, and how many those are.
    weight: dict[int, list[tuple[Tensor, int]]] = field(default_factory=lambda: {q: [] for q in (1, 2, 3, 4)})

    def record(self, chosen_N: Tensor, policy_support: Support, step: "SteeredStep", quarter: int) -> None:
        """Add one step. `chosen_N` (bool) are the positions that it commits; `policy_support` is unsteered."""
        self.committed.append(chosen_N.sum())
        self.entropy.append(torch.where(chosen_N, policy_support.entropy(), 0.0).sum())
        if step.broken is not None:
            self.changed.append(((step.support.best() != policy_support.best()) & chosen_N).sum())
            self.guided.append(chosen_N.sum())
            self.broken.append(step.broken)
        if step.w_N is not None:
            self.weight[quarter].append((step.w_N.sum(), len(step.w_N)))


@dataclass(frozen=True)
class OpenPositions:
    """The N hidden positions of a step, row by row."""

    hidden_N: Tensor  # in the flattened completions of the rows still being written, cut at the window's end
    row_N: Tensor  # number of the row among the rows still being written
    position_N: Tensor  # position in the row's completion
    flat_N: Tensor  # in the flattened completions of all B rows


@dataclass
class Canvas:
    """B completions while they are written: what is there, when it was committed, both log-probabilities."""

    tokens_BL: Tensor  # prompts and completions; the mask token at hidden positions
    attention_BL: Tensor
    masked_BC: Tensor  # bool, positions still to be written; False after the end of a finished row
    step_BC: Tensor
    behaviour_BC: Tensor
    policy_BC: Tensor
    rows_A: Tensor  # numbers of the rows still being written

    @staticmethod
    def start(prompt_BL: Tensor, attention_BL: Tensor, config: RolloutConfig, mask_id: int) -> "Canvas":
        """C mask tokens after each left-padded prompt. `step_BC` is T where nothing gets committed."""
        B, C, device = len(prompt_BL), config.max_completion_length, prompt_BL.device
        return Canvas(
            tokens_BL=torch.cat([prompt_BL, torch.full((B, C), mask_id, device=device)], 1),
            attention_BL=torch.cat([attention_BL, torch.ones(B, C, dtype=torch.bool, device=device)], 1),
            masked_BC=torch.ones(B, C, dtype=torch.bool, device=device),
            step_BC=torch.full((B, C), config.steps, device=device),
            behaviour_BC=torch.zeros(B, C, device=device),
            policy_BC=torch.zeros(B, C, device=device),
            rows_A=torch.arange(B, device=device),
        )

    @property
    def width(self) -> int:
        """Length of the prompts, padding included."""
        return self.tokens_BL.shape[1] - self.masked_BC.shape[1]

    @property
    def completion_BC(self) -> Tensor:
        """A view: writing to it writes the canvas."""
        return self.tokens_BL[:, self.width :]

    def drop_finished(self, is_end: Callable[[Tensor], Tensor]) -> Tensor:
        """Stop writing rows whose text is final. Returns which of `rows_A` stay (bool). Waits for the device."""
        self.masked_BC &= unfinished(self.completion_BC, self.masked_BC, is_end)[:, None]
        keep_A = self.masked_BC[self.rows_A].any(1)
        if not keep_A.all():
            self.rows_A = self.rows_A[keep_A]
        return keep_A

    def open_positions(self, end: int, N: int) -> OpenPositions:
        """The N hidden positions before `end` of the rows still being written."""
        C = self.masked_BC.shape[1]
        hidden_N = self.masked_BC[self.rows_A, :end].flatten().sort(descending=True, stable=True).indices[:N]
        row_N, position_N = hidden_N // end, hidden_N % end
        return OpenPositions(hidden_N, row_N, position_N, self.rows_A[row_N] * C + position_N)

    def commit(self, commit_BC: Tensor, t: int, flat_N: Tensor, token_N: Tensor, logp: tuple[Tensor, Tensor]) -> None:
        """Write `token_N` where `commit_BC` holds, at step t; `logp` is (behaviour_N, policy_N) of those tokens."""
        B, C = commit_BC.shape
        for record_BC, value_N in zip(
            (self.completion_BC, self.behaviour_BC, self.policy_BC), (token_N, *logp), strict=True
        ):
            record_BC.copy_(torch.where(commit_BC, spread(value_N, flat_N, B, C, 0), record_BC))
        self.step_BC.masked_fill_(commit_BC, t)
        self.masked_BC &= ~commit_BC

    def finish(self, mask_id: int, is_end: Callable[[Tensor], Tensor]) -> Rollout:
        """The rollout. What a finished row left open comes after its end token, which fills it."""
        completion_BC = self.completion_BC
        is_end_BC = is_end(completion_BC)
        first_end_B1 = completion_BC.gather(1, is_end_BC.byte().argmax(1, keepdim=True))
        completion_BC.copy_(torch.where(completion_BC == mask_id, first_end_B1, completion_BC))
        ended_BC = is_end_BC.long().cumsum(1)
        return Rollout(
            canvas_BL=self.tokens_BL,
            attention_BL=self.attention_BL,
            completion_mask_BC=(ended_BC - is_end_BC.long()) == 0,
            unmask_step_BC=self.step_BC,
            behaviour_logp_BC=self.behaviour_BC,
            policy_logp_BC=self.policy_BC,
        )


class MaskedLogits:
    """The policy's logits at hidden positions, with the forward passes that can be spared left out."""

    def __init__(self, policy: DiffusionLM, canvas: Canvas, config: RolloutConfig) -> None:
        self.policy, self.canvas = policy, canvas
        self.cached = config.block_length > 0 and config.block_cache
        self.prefix = PrefixCache(0)
        # The rows of a group start identical, so the first step needs one forward pass for each group.
        self.row_U, self.group_B = first_occurrences(torch.cat([canvas.tokens_BL, canvas.attention_BL], 1))

    def keep_rows(self, keep_A: Tensor) -> None:
        """Forget the cache of rows that are finished."""
        if not keep_A.all():
            self.prefix = self.prefix.rows(keep_A)

    def __call__(self, t: int, window: Window, positions: OpenPositions) -> Tensor:
        """logits_NV at `positions` in step t."""
        canvas = self.canvas
        tokens_BL, attention_BL, width = canvas.tokens_BL, canvas.attention_BL, canvas.width
        L = tokens_BL.shape[1]
        if t == 0 and len(self.row_U) < len(tokens_BL):
            position_C = torch.arange(width, width + window.end, device=tokens_BL.device)
            at_UC = torch.arange(len(self.row_U), device=tokens_BL.device)[:, None] * L + position_C
            logits_NV = self.policy.logits(tokens_BL[self.row_U], attention_BL[self.row_U], at_UC.flatten())
            return logits_NV.unflatten(0, at_UC.shape)[self.group_B].flatten(0, 1)
        at_N = positions.row_N * L + width + positions.position_N
        if not self.cached:
            return self.policy.logits(tokens_BL[canvas.rows_A], attention_BL[canvas.rows_A], at_N)
        if window.hidden == window.end - window.first or t == 1:  # a new block, or the first pass over every row
            self.prefix = PrefixCache(width + window.first - 1)  # the state before the block scores its first token
        return self.policy.logits(tokens_BL[canvas.rows_A], attention_BL[canvas.rows_A], at_N, self.prefix)


@dataclass(frozen=True)
class SteeredStep:
    """The distribution that a step samples from, and what was seen while steering it."""

    support: Support
    w_N: Tensor | None = None  # entropy weights (`entrgi` only)
    broken: Tensor | None = None  # number of gradients that were not finite; None: the step was not guided


def steered_step(
    logits_NV: Tensor,
    policy_support: Support,
    hidden: Hidden,
    u_MN: Tensor,
    guide: Guide,
    config: RolloutConfig,
    policy: DiffusionLM,
) -> SteeredStep:
    """Steer `logits_NV` in place, and take the distribution of what comes out."""
    w_N, broken = steer(logits_NV, policy_support, hidden, u_MN, guide, config, policy.is_end)
    if guide.config.support == "policy":
        return SteeredStep(policy_support.steered(logits_NV, scale_of(config)), w_N, broken)
    return SteeredStep(support_of(logits_NV, scale_of(config), config.top_k, config.top_p), w_N, broken)


@torch.no_grad()
def denoise(
    policy: DiffusionLM,
    prompt_BL: Tensor,
    attention_BL: Tensor,
    config: RolloutConfig,
    noise: RolloutNoise,
    guide: Guide | None = None,
    stats: DenoiseStats | None = None,
) -> Rollout:
    """Unmask C tokens after each left-padded prompt in T steps (EntRGi, arXiv 2602.05000, algorithm 1).

    Each step takes the policy's logits at the hidden positions, steers them if `guide` is given, samples every hidden
    position and commits the k most confident of each row (ties: sampling.py), k from the linear schedule. The rollout
    records the step of each token and its log-probability under the guided (behaviour) and the policy's tempered,
    truncated distribution. With `confidence_from="policy"` the order depends on the unsteered logits only.

    With temperature 0 each position takes its most likely token, of the guided logits where it is guided, and nothing
    is drawn. What is recorded is then of distributions that hold one token: 0, or -inf for another token than it.
    """
    B, C, noise = len(prompt_BL), config.max_completion_length, noise.to(prompt_BL.device)
    canvas = Canvas.start(prompt_BL, attention_BL, config, policy.mask_id)
    masked_logits = MaskedLogits(policy, canvas, config)
    # Asking a GPU for a value makes it wait, so there rows leave only where `commit_above` asks anyway.
    drops_rows = prompt_BL.device.type == "cpu" or config.commit_above < 1
    for t, window in enumerate(write_schedule(C, config.steps, config.block_length)):
        N = len(canvas.rows_A) * window.hidden  # known without asking, if every row hides as many
        if drops_rows and t > 0:
            masked_logits.keep_rows(canvas.drop_finished(policy.is_end))
            N = int(canvas.masked_BC[:, : window.end].sum())
            if N == 0:
                continue
        positions = canvas.open_positions(window.end, N)
        logits_NV = masked_logits(t, window, positions)
        policy_support = support_of(logits_NV, scale_of(config), config.top_k, config.top_p)
        certainty_N = certainty(logits_NV, policy_support)  # before steering, which overwrites the logits
        step = SteeredStep(policy_support)
        if guide is not None and guide.steers(t):
            hidden = Hidden(canvas.completion_BC[canvas.rows_A, : window.end], positions.hidden_N, canvas.rows_A)
            u_MN = noise.hard_BTMC[:, t].transpose(0, 1).flatten(1)[:, positions.flat_N]
            step = steered_step(logits_NV, policy_support, hidden, u_MN, guide, config, policy)
        drawn, policy_drawn = drawn_from(step.support, config), drawn_from(policy_support, config)
        token_N = drawn.token(drawn.pick(noise.token_BTC[:, t].flatten()[positions.flat_N]))
        order_N = noise.order_BTC[:, t].flatten()[positions.flat_N]
        ranked = step.support if config.confidence_from == "guided" else policy_support
        rank_2N = confidence(ranked, token_N, order_N, config, policy.is_end), certainty_N
        confidence_BC, certainty_BC = (spread(rank_N, positions.flat_N, B, C, float("-inf")) for rank_N in rank_2N)
        also_BC = None
        if config.commit_above < 1:
            sure_N = ranked.logp(ranked.best()).exp() > config.commit_above
            also_BC = spread(sure_N, positions.flat_N, B, C, False)
        commit_BC = most_confident(confidence_BC, certainty_BC, window.commit, also_BC)
        logp = drawn.logp(token_N), policy_drawn.logp(token_N)
        canvas.commit(commit_BC, t, positions.flat_N, token_N, logp)
        if stats is not None:
            stats.record(commit_BC.flatten()[positions.flat_N], policy_drawn, step, 1 + 4 * t // config.steps)
    return canvas.finish(policy.mask_id, policy.is_end)


def first_occurrences(rows_BX: Tensor) -> tuple[Tensor, Tensor]:
    """row_U, the first of each set of equal rows, and group_B, the set of each row. Waits for the device."""
    rows = [tuple(row) for row in rows_BX.tolist()]
    first = {row: b for b, row in reversed(list(enumerate(rows)))}
    group = {row: u for u, row in enumerate(sorted(first, key=first.__getitem__))}
    row_U = torch.tensor(sorted(first.values()), device=rows_BX.device)
    return row_U, torch.tensor([group[row] for row in rows], device=rows_BX.device)


def unfinished(completion_BC: Tensor, masked_BC: Tensor, is_end: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows (bool, B) that hide a token before their first end token. Later tokens are not part of the text."""
    ended_BC = (is_end(completion_BC) & ~masked_BC).cumsum(1) > 0
    return (masked_BC & ~ended_BC).any(1)
