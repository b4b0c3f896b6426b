"""The reward's own gradient in the weights: a pathwise policy gradient, first-order and mean-field.

Take a finished completion x, and the canvas as it stood before a denoising step s. At the positions i that it masks,
with the policy's logits there:

    K_i  the policy's top-p/top-k support without the tokens that are not text (a constant)
    p_i  softmax(logits / temperature) over K_i;  e_i = sum_v p_i(v) E[v], the expected embedding
    b_i  e_i + w_i (E[x_i] - e_i) with a constant w_i, as in rgrl/rollout/guidance.py: what the reward model reads
    g_i  the gradient of its reward there (a constant)

    loss = -mean_rows sum_i <g_i, e_i> + kl mean_rows (sum_i KL_i / tokens of the row)

The first sum is the reward to first order, of all candidates at once, where a policy gradient sees one token a position
and one number a row. Its gradient is exact as a policy gradient only for writing all of the positions at once, under a
reward that adds up over positions. End tokens are excluded from the candidates, so this term carries no signal about
length: that is left to the objective and to the KL, which knows no end but one that the canvas shows. The canvas is
read as a whole, also where the sampler read a cached prefix (`rollout.block_cache`).

`reward_term` is called by `update_step`; what it calls follows in the order of the call.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgrl.config import Config, GradientConfig, RolloutConfig
from rgrl.models import Policy
from rgrl.models.readout import Positions, Readout, kl_to_reference, read_out
from rgrl.rollout.denoise import write_schedule
from rgrl.rollout.guidance import Guide, Hidden, normalised_entropy, reward_gradient, shown_to_reward
from rgrl.rollout.sampling import support_of
from rgrl.types import LossTerm, Rollout

# Metrics of the term that are means over something other than rows: the sums that they are divided by.
MEANS_OVER = {
    "gradient/kl": "asked",
    "gradient/entropy_weight": "soft",
    "gradient/outside": "soft",
    "gradient/broken": "soft",
}


def reward_term(
    policy: Policy,
    guide: Guide,
    rollout: Rollout,
    *,
    step_KB: Tensor,
    micro_batches: Sequence[slice],
    dropout_key_B: Tensor,
    parameters: Sequence[torch.nn.Parameter],
    config: Config,
    reward_weight: float = 1.0,
) -> LossTerm:
    """The term's loss and gradient at the canvas before each denoising step of `step_KB`, drawn for one update.

    Makes a forward pass of the base, the policy and the reward model, and a backward pass, for each micro-batch and k.
    `reward_weight` is the weight of the guide's reward in the sum of rewards.
    """
    c, states = config.gradient, []
    term = LossTerm(c.weight, over=MEANS_OVER)
    number_B = torch.arange(len(rollout.canvas_BL), device=policy.device)
    block = config.rollout.block_length if c.places == "block" else 0
    for step_B, rows in itertools.product(step_KB, micro_batches):
        states.append(state_before(rollout.rows(rows), number_B[rows], step_B[rows], guide, policy.is_end, block))
    references = [reference_states(policy, state) if c.kl > 0 else {} for state in states]
    policy.train()  # gradient checkpointing and LoRA dropout are off otherwise
    for state, reference in zip(states, references, strict=True):
        with policy.forward_passes(dropout_key_B[state.rows_B.cpu()]):
            states_NH = policy.states(state.canvas(policy.mask_id), state.rollout.attention_BL)[state.at_BL]
        values = read_text(policy, guide, state, states_NH, reference, config.rollout)
        expansion = expand(guide, state, values, c.blend)
        loss_sum = -first_order(reward_weight * expansion.g_ND, values["soft"])
        if c.kl > 0:
            loss_sum = loss_sum + c.kl * kl_by_row(values["kl_to_reference"], state).sum()
        loss_sum = loss_sum / c.draws
        policy.backward(loss_sum)
        term.add({"loss": loss_sum, **term_sums(expansion, values, c.draws)})
    policy.eval()
    term.take_gradient(parameters)
    return term


@torch.no_grad()
def reference_states(policy: Policy, state: "State") -> dict[str, Tensor]:
    """The frozen base's final hidden states at the asked positions, as `kl_to_reference` reads them."""
    with policy.forward_passes(), policy.reference():
        return {"reference_NH": policy.states(state.canvas(policy.mask_id), state.rollout.attention_BL)[state.at_BL]}


def read_text(
    policy: Policy,
    guide: Guide,
    state: "State",
    states_NH: Tensor,
    reference: dict[str, Tensor],
    sampler: RolloutConfig,
) -> dict[str, Tensor]:
    """`expected_text` at the asked positions and, with a `reference`, the KL to it."""
    text_V = text_tokens(guide, policy.is_end)

    def text(positions: Positions) -> dict[str, Tensor]:
        return expected_text(positions.logits_NV, positions.token_N, guide.embedding_VD, text_V, sampler)

    readouts: dict[str, Readout] = {"text": text} | ({"kl_to_reference": kl_to_reference} if reference else {})
    return read_out(policy.project, states_NH, state.token_N, readouts, reference, vocab_size=policy.vocab_size)


# -------------------------------------------------------------------------------------------------------- states
def draw_steps(
    rollout: Rollout,
    config: GradientConfig,
    sampler: RolloutConfig,
    generators: Sequence[torch.Generator],
    updates: int,
) -> Tensor:
    """step_UKB (int64): `config.draws` denoising steps of each row for each of `updates`. One generator a row.

    First a block of those that the row wrote, uniformly, then one of its steps, up to the last that wrote a token which
    the row's text hangs on (`Rollout.decided_BC`). With `states: late` at u^(1/3) of the way. A row that goes on being
    written after its text is final, as on a GPU, draws the same steps.
    """
    T, C = sampler.steps, rollout.completion_mask_BC.shape[1]
    block = sampler.block_length or C
    draws = [torch.rand((updates, config.draws, 2), generator=g) for g in generators]
    u_UKB2 = torch.stack(draws, 2).to(rollout.canvas_BL.device)
    plan = write_schedule(C, T, sampler.block_length)
    first_J = torch.tensor([next(t for t, w in enumerate(plan) if w.first == i) for i in range(0, C, block)])
    last_BJ = rollout.unmask_step_BC.masked_fill(~rollout.decided_BC, -1).unflatten(1, (-1, block)).amax(2)
    blocks_B = (last_BJ >= 0).sum(1)
    block_UKB = torch.minimum((u_UKB2[..., 0] * blocks_B).long(), blocks_B - 1)
    first_UKB = first_J.to(last_BJ.device)[block_UKB]
    steps_UKB = last_BJ.expand(updates, config.draws, -1, -1).gather(3, block_UKB[..., None])[..., 0] - first_UKB + 1
    u_UKB = u_UKB2[..., 1] ** (1 / 3) if config.states == "late" else u_UKB2[..., 1]
    return first_UKB + torch.minimum((u_UKB * steps_UKB).long(), steps_UKB - 1)


@dataclass(frozen=True)
class State:
    """Completions as they stood before one denoising step of each row, and as they were written in the end."""

    rollout: Rollout
    rows_B: Tensor  # which of the guide's prompts they answer
    hidden_BC: Tensor  # bool, what the canvas hides
    asked_BC: Tensor  # bool, of that, where the policy is asked: nothing after an end token that the canvas shows
    soft_BC: Tensor  # bool, of that, where the reward reads a token of the finished text: an expected embedding there
    shown_BC: Tensor  # bool, what the reward reads of the finished completion

    def canvas(self, mask_id: int) -> Tensor:
        """canvas_BL with mask tokens at the hidden positions."""
        return self.rollout.canvas_BL.masked_fill(self._in_canvas(self.hidden_BC), mask_id)

    @property
    def at_BL(self) -> Tensor:
        """The asked positions in the canvas (bool)."""
        return self._in_canvas(self.asked_BC)

    @property
    def token_N(self) -> Tensor:
        """What was written in the end at the asked positions."""
        return self.rollout.completion_BC[self.asked_BC]

    def _in_canvas(self, mask_BC: Tensor) -> Tensor:
        prompt = self.rollout.canvas_BL.shape[1] - mask_BC.shape[1]
        return torch.nn.functional.pad(mask_BC, (prompt, 0), value=False)


def state_before(
    rollout: Rollout, rows_B: Tensor, step_B: Tensor, guide: Guide, is_end: Callable[[Tensor], Tensor], block: int = 0
) -> State:
    """The state before step `step_B` of each row, which answers the guide's prompt `rows_B`.

    With `block`, only the positions of the block of `block` tokens that was being written are asked about. Positions
    that are still hidden when the text is final, after its end, are the same whether or not the sampler went on.
    """
    token_BC = rollout.completion_BC
    hidden_BC = rollout.unmask_step_BC >= step_B[:, None]
    asked_BC = hidden_BC & ~((is_end(token_BC) & ~hidden_BC).long().cumsum(1) > 0)
    if block:
        # The first hidden block is the one being written.
        block_C = torch.arange(hidden_BC.shape[1], device=step_B.device) // block
        written_B1 = torch.where(hidden_BC, block_C, block_C[-1]).amin(1, keepdim=True)
        asked_BC = asked_BC & (block_C == written_B1)
    shown_BC = shown_to_reward(token_BC, is_end, guide.attend_eos, guide.unseen_V)
    return State(rollout, rows_B, hidden_BC, asked_BC, asked_BC & shown_BC & ~is_end(token_BC), shown_BC)


# -------------------------------------------------------------------------------------------------- what is read
def text_tokens(guide: Guide, is_end: Callable[[Tensor], Tensor]) -> Tensor:
    """text_V (bool): the tokens that are text. Not those that end it, nor those that it drops (`Guide.unseen_V`)."""
    text_V = ~is_end(torch.arange(len(guide.embedding_VD), device=guide.embedding_VD.device))
    return text_V if guide.unseen_V is None else text_V & ~guide.unseen_V


def expected_text(
    logits_NV: Tensor, token_N: Tensor, embedding_VD: Tensor, text_V: Tensor, sampler: RolloutConfig
) -> dict[str, Tensor]:
    """The expected embedding `soft_ND` (with gradient) of each position over its candidates: the support within
    `text_V`.

    Also, without gradient, `inside_N` (bool): whether `token_N` is a candidate, `some_N`: whether there is any (where
    not, `soft` is 0), and `entropy_weight_N` in 0 ... 1, of the untempered distribution over the whole vocabulary.
    """
    with torch.no_grad():
        plain_NV = logits_NV.detach()
        support = support_of(plain_NV, sampler.temperature, sampler.top_k, sampler.top_p)
        kept_NK = support.logp_NK > float("-inf")
        kept_NK &= text_V if support.token_NK is None else text_V[support.token_NK]
        all_tokens = torch.arange(logits_NV.shape[1], device=logits_NV.device)
        token_NK = all_tokens if support.token_NK is None else support.token_NK
        values = {
            "inside": ((token_NK == token_N[:, None]) & kept_NK).any(1),
            "some": kept_NK.any(1),
            "entropy_weight": normalised_entropy(plain_NV, logits_NV.shape[1]),
        }
    return values | {"soft": expected_embedding(logits_NV, support.token_NK, kept_NK, embedding_VD, sampler)}


def expected_embedding(
    logits_NV: Tensor, token_NK: Tensor | None, kept_NK: Tensor, embedding_VD: Tensor, sampler: RolloutConfig
) -> Tensor:
    """soft_ND under softmax(logits / temperature) over the kept ones (bool) of K tokens (None: all), with gradient.

    0 where none is kept.
    """
    some_N1 = kept_NK.any(1, keepdim=True)
    phi_NK = logits_NV if token_NK is None else logits_NV.gather(1, token_NK)
    # Where none is kept any distribution will do: nothing of it is used, and its gradient must not be NaN.
    phi_NK = torch.where(some_N1, phi_NK / sampler.temperature, 0.0).masked_fill(~kept_NK & some_N1, float("-inf"))
    p_NK = (phi_NK.softmax(1) * some_N1).to(embedding_VD.dtype)
    if token_NK is None:
        return p_NK @ embedding_VD
    # No N x K x D is made.
    bag = torch.nn.functional.embedding_bag
    return bag(token_NK, embedding_VD, per_sample_weights=p_NK, mode="sum")


# ------------------------------------------------------------------------------------------------------ gradient
@dataclass(frozen=True)
class Expansion:
    """The reward to first order around a blend of expected and written embeddings, at the N asked positions."""

    reward_B: Tensor  # the guide's, of the blend
    blend_ND: Tensor
    g_ND: Tensor  # 0 where the reward reads no expected embedding, or the gradient is not finite
    soft_N: Tensor  # bool, where it reads one
    broken: Tensor  # how many gradients were not finite


def expand(guide: Guide, state: State, values: dict[str, Tensor], blend: str) -> Expansion:
    """The reward of x with the blend at its soft positions, and its gradient there: one pass, forward and backward.

    `values` are those of `expected_text` at the asked positions, and `blend` is the kind (`GradientConfig.blend`).
    """
    soft_N = state.soft_BC[state.asked_BC] & values["some"]
    blend_ND = blended(values, state.token_N, guide.embedding_VD, blend)
    hidden, known_BCD = _hidden(state, soft_N), guide.embedding_VD[state.rollout.completion_BC]
    found = reward_gradient(guide, blend_ND[soft_N], known_BCD, hidden, state.shown_BC)
    g_nD = torch.where(found.finite_N[:, None], found.g_ND, 0.0)
    g_ND = torch.zeros_like(blend_ND).masked_scatter(soft_N[:, None], g_nD)
    return Expansion(found.reward_B, blend_ND, g_ND, soft_N, (~found.finite_N).sum())


def blended(values: dict[str, Tensor], token_N: Tensor, embedding_VD: Tensor, blend: str) -> Tensor:
    """b_ND, without gradient: what the reward model is shown at the asked positions."""
    soft_ND = values["soft"].detach()
    if blend == "expectation":
        return soft_ND
    hard_ND = embedding_VD[token_N]
    if blend == "aps":
        return hard_ND
    return soft_ND + values["entropy_weight"][:, None].to(soft_ND.dtype) * (hard_ND - soft_ND)


def _hidden(state: State, soft_N: Tensor) -> Hidden:
    positions_N = state.asked_BC.flatten().nonzero()[:, 0]
    return Hidden(state.rollout.completion_BC, positions_N[soft_N], state.rows_B)


def first_order(g_ND: Tensor, soft_ND: Tensor) -> Tensor:
    """sum_i <g_i, e_i>, float32 or wider."""
    return (g_ND * soft_ND).sum(dtype=torch.promote_types(soft_ND.dtype, torch.float32))


def kl_by_row(kl_N: Tensor, state: State) -> Tensor:
    """kl_B: the sum over each row's asked positions, divided by its tokens up to and including the first end token."""
    kl_BC = kl_N.new_zeros(state.asked_BC.shape).masked_scatter(state.asked_BC, kl_N)
    return kl_BC.sum(1) / state.rollout.completion_mask_BC.sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------------- metrics
def term_sums(expansion: Expansion, values: dict[str, Tensor], draws: int) -> dict[str, Tensor]:
    """Sums of the metrics of one draw out of `draws`, and what they are divided by (`MEANS_OVER`; `n` counts rows)."""
    soft_N = expansion.soft_N
    sums = {
        "n": expansion.reward_B.new_tensor(len(expansion.reward_B) / draws),
        "asked": torch.tensor(len(soft_N), device=soft_N.device),
        "soft": soft_N.sum(),
        "gradient/reward": expansion.reward_B.sum() / draws,
        "gradient/entropy_weight": values["entropy_weight"][soft_N].sum(),
        "gradient/outside": (soft_N & ~values["inside"]).sum(),
        "gradient/broken": expansion.broken,
    }
    if "kl_to_reference" in values:
        sums["gradient/kl"] = values["kl_to_reference"].detach().sum()
    return {name: value.float() for name, value in sums.items()}
