"""The reward's gradient in the weights: what guidance computes at every step, as a term of the loss.

Take a finished completion x, and the canvas as it stood before a denoising step s. At the places i that it hid, with
the policy's logits there:

    K_i  the policy's own top-p/top-k support without the tokens that are no text (a constant)
    p_i  softmax(logits / temperature) over K_i;  e_i = sum_v p_i(v) E[v], the expected embedding
    b_i  e_i + w_i (E[x_i] - e_i) with a constant w_i, as in rgrl/rollout/guidance.py: what the reward model is shown
    g_i  the gradient of its reward there (a constant)

    loss = -mean_rows sum_i <g_i, e_i> + kl mean_rows (sum_i KL_i / tokens of the row)
           + marginal mean_rows (sum_i 1 / tokens of the row) KL(m || m_base)

or, instead of the first sum, the KL to what a step of guidance along g_i would make of the logits (`distil`).

m is the policy's distribution averaged over all the update's places, m_base the base's. That KL is at most the one
before it, and is the part of it that no context explains: the same word everywhere.

The first sum is the reward to first order, of all candidates at once, where a policy gradient sees one token a place
and one number a row. Its gradient is exact as a policy gradient only for writing all of the places at once, under a
reward that adds up over places. End tokens, and others that the text drops, are no candidates: their embedding says
nothing of what ending the text does. How long a text is, is left to the objective and the KL, which knows no end but
one that the canvas shows. The canvas is read as a whole, also where the sampler read a cached prefix
(`rollout.block_cache`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgrl.config import GradientConfig, RolloutConfig
from rgrl.models.readout import finite_log_softmax
from rgrl.rollout.denoise import write_schedule
from rgrl.rollout.guidance import Guide, Hidden, normalised_entropy, reward_gradient, shown_to_reward
from rgrl.rollout.sampling import support_of
from rgrl.types import Rollout

# Metrics of the term that are means over something else than rows: the sums that they are divided by.
MEANS_OVER = {
    "gradient/kl": "asked",
    "gradient/marginal": "weight",
    "gradient/entropy_weight": "soft",
    "gradient/outside": "soft",
    "gradient/broken": "soft",
}


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
        """canvas_BL with mask tokens at the hidden places."""
        return self.rollout.canvas_BL.masked_fill(self._in_canvas(self.hidden_BC), mask_id)

    @property
    def at_BL(self) -> Tensor:
        """The asked places in the canvas (bool)."""
        return self._in_canvas(self.asked_BC)

    @property
    def token_N(self) -> Tensor:
        """What was written in the end at the asked places."""
        return self.rollout.completion_BC[self.asked_BC]

    def _in_canvas(self, mask_BC: Tensor) -> Tensor:
        prompt = self.rollout.canvas_BL.shape[1] - mask_BC.shape[1]
        return torch.nn.functional.pad(mask_BC, (prompt, 0), value=False)


def state_before(
    rollout: Rollout, rows_B: Tensor, step_B: Tensor, guide: Guide, is_end: Callable[[Tensor], Tensor], block: int = 0
) -> State:
    """The state before step `step_B` of each row, which answers the guide's prompt `rows_B`.

    With `block`, only the places of the block of `block` tokens that was being written are asked about. Places that are
    still hidden when the text is final, after its end, are the same whether or not the sampler went on.
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
    """The expected embedding `soft_ND` (with gradient) of each place over its candidates: the support within `text_V`.

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


def distance_to_guided(
    logits_NV: Tensor, g_ND: Tensor, embedding_VD: Tensor, text_V: Tensor, tau: float, config: GradientConfig
) -> Tensor:
    """KL_N(q || p), nats, of p = softmax(logits / tau) with q = softmax((logits + delta) / tau), a constant.

    delta is one step of guidance on the logits of `text_V`, along d = p (<g, E> - its mean) / tau, the gradient of the
    reward: eta d (`distil`) or eta d / (|d| + 1e-8), the first step of Adam (`distil_adam`). It is 0 where guidance
    does nothing, and so is the gradient. Impossible tokens stay impossible.
    """
    with torch.no_grad():
        own_NV = logits_NV.detach()
        p_NV = (own_NV / tau).softmax(-1)
        value_NV = (g_ND @ embedding_VD.T).to(p_NV.dtype)
        d_NV = p_NV * (value_NV - (p_NV * value_NV).sum(-1, keepdim=True)) / tau
        if config.loss == "distil_adam":
            d_NV /= d_NV.abs() + 1e-8
        guided_NV = finite_log_softmax((own_NV + config.eta * d_NV * text_V) / tau)
    return (guided_NV.exp() * (guided_NV - finite_log_softmax(logits_NV / tau))).sum(-1)


def surprise(logits_NV: Tensor, token_N: Tensor, g_ND: Tensor, embedding_VD: Tensor, sampler: RolloutConfig) -> Tensor:
    """h_N = <g, E[token] - e>, float32 or wider, with e expected under the sampler's own distribution, end tokens too.

    Its mean over tokens drawn from that distribution is 0.
    """
    with torch.no_grad():
        support = support_of(logits_NV.detach(), sampler.temperature, sampler.top_k, sampler.top_p)
        kept_NK = support.logp_NK > float("-inf")
    soft_ND = expected_embedding(logits_NV, support.token_NK, kept_NK, embedding_VD, sampler)
    return (g_ND * (embedding_VD[token_N] - soft_ND)).sum(1, dtype=torch.promote_types(g_ND.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------ gradient
@dataclass(frozen=True)
class Expansion:
    """The reward to first order around a blend of expected and written embeddings, at the N asked places."""

    reward_B: Tensor  # the guide's, of the blend
    blend_ND: Tensor
    g_ND: Tensor  # 0 where the reward reads no expected embedding, or the gradient is not finite
    soft_N: Tensor  # bool, where it reads one
    broken: Tensor  # how many gradients were not finite


def expand(guide: Guide, state: State, values: dict[str, Tensor], blend: str) -> Expansion:
    """The reward of x with the blend at its soft places, and its gradient there: one pass, forward and backward.

    `values` are those of `expected_text` at the asked places, and `blend` is the kind (`GradientConfig.blend`).
    """
    soft_N = state.soft_BC[state.asked_BC] & values["some"]
    blend_ND = blended(values, state.token_N, guide.embedding_VD, blend)
    hidden, known_BCD = _hidden(state, soft_N), guide.embedding_VD[state.rollout.completion_BC]
    found = reward_gradient(guide, blend_ND[soft_N], known_BCD, hidden, state.shown_BC)
    g_nD = torch.where(found.finite_N[:, None], found.g_ND, 0.0)
    g_ND = torch.zeros_like(blend_ND).masked_scatter(soft_N[:, None], g_nD)
    return Expansion(found.reward_B, blend_ND, g_ND, soft_N, (~found.finite_N).sum())


def blended(values: dict[str, Tensor], token_N: Tensor, embedding_VD: Tensor, blend: str) -> Tensor:
    """b_ND, without gradient: what the reward model is shown at the asked places."""
    soft_ND = values["soft"].detach()
    if blend == "expectation":
        return soft_ND
    hard_ND = embedding_VD[token_N]
    if blend == "aps":
        return hard_ND
    return soft_ND + values["entropy_weight"][:, None].to(soft_ND.dtype) * (hard_ND - soft_ND)


def _hidden(state: State, soft_N: Tensor) -> Hidden:
    places_N = state.asked_BC.flatten().nonzero()[:, 0]
    return Hidden(state.rollout.completion_BC, places_N[soft_N], state.rows_B)


def first_order(g_ND: Tensor, soft_ND: Tensor) -> Tensor:
    """sum_i <g_i, e_i>, float32 or wider."""
    return (g_ND * soft_ND).sum(dtype=torch.promote_types(soft_ND.dtype, torch.float32))


def kl_by_row(kl_N: Tensor, state: State) -> Tensor:
    """kl_B: the sum over each row's asked places, divided by its tokens up to and including the first end token."""
    kl_BC = kl_N.new_zeros(state.asked_BC.shape).masked_scatter(state.asked_BC, kl_N)
    return kl_BC.sum(1) / state.rollout.completion_mask_BC.sum(1).clamp(min=1)


def row_weights(state: State) -> Tensor:
    """c_N: 1 / (tokens of the row) at each asked place, as the KL is weighted."""
    tokens_B = state.rollout.completion_mask_BC.sum(1).clamp(min=1)
    return 1.0 / tokens_B[state.asked_BC.nonzero()[:, 0]]


def overuse(policy_V: Tensor, base_V: Tensor) -> Tensor:
    """log(m / m_base)_V of two averages, each given as a sum over the same weighted places; 0 where there are none.

    The gradient of KL(m || m_base), whose m is a mean of the places' distributions, is that of the places' mean of
    sum_v p(v) log(m / m_base)(v), with the logarithm held: what adds to a probability does not add to their sum.
    """
    tiny = torch.finfo(policy_V.dtype).tiny
    return policy_V.clamp(min=tiny).log() - base_V.clamp(min=tiny).log()


def centred(g_ND: Tensor, soft_N: Tensor, state: State, direction_BD: Tensor | None = None) -> Tensor:
    """g_ND without a common direction: `direction_BD` of each row, or (None) the mean over the row's soft places.

    What is left says where a token is worth more than elsewhere. Other places stay 0.
    """
    row_N = state.asked_BC.nonzero()[:, 0]
    if direction_BD is None:
        among_NB = (
            soft_N[:, None] & (row_N[:, None] == torch.arange(len(state.asked_BC), device=row_N.device))
        ).float()
        direction_BD = among_NB.T.to(g_ND.dtype) @ g_ND / among_NB.sum(0).clamp(min=1)[:, None].to(g_ND.dtype)
    return torch.where(soft_N[:, None], g_ND - direction_BD[row_N], 0.0)


def text_gradients(guide: Guide, rollout: Rollout, rows_B: Tensor, is_end: Callable[[Tensor], Tensor]) -> Tensor:
    """g_BCD: the gradient of the reward of each completion with respect to the embeddings of its text; 0 elsewhere.

    Places whose gradient is not finite are 0 too.
    """
    token_BC = rollout.completion_BC
    shown_BC = shown_to_reward(token_BC, is_end, guide.attend_eos, guide.unseen_V)
    at_N = (shown_BC & ~is_end(token_BC)).flatten().nonzero()[:, 0]
    known_BCD = guide.embedding_VD[token_BC]
    hidden = Hidden(token_BC, at_N, rows_B)
    found = reward_gradient(guide, known_BCD.flatten(0, 1)[at_N], known_BCD, hidden, shown_BC)
    g_ND = torch.where(found.finite_N[:, None], found.g_ND, 0.0)
    return torch.zeros_like(known_BCD).flatten(0, 1).index_put((at_N,), g_ND).view_as(known_BCD)


def mean_of_others(g_BCD: Tensor, G: int) -> Tensor:
    """At each place the mean gradient of those other completions of the group that have one; 0 where none has."""
    g_PGCD = g_BCD.unflatten(0, (-1, G))
    has_PGC1 = (g_PGCD != 0).any(-1, keepdim=True).to(g_PGCD.dtype)
    others_PGCD, count_PGC1 = (x.sum(1, keepdim=True) - x for x in (g_PGCD, has_PGC1))
    mean_PGCD = torch.where(count_PGC1 > 0, others_PGCD / count_PGC1.clamp(min=1), 0.0)
    return mean_PGCD.flatten(0, 1)


# ------------------------------------------------------------------------------------------------------- metrics
def term_sums(found: Expansion, values: dict[str, Tensor], state: State, draws: int) -> dict[str, Tensor]:
    """Sums of the metrics of one draw out of `draws`, and what they are divided by (`MEANS_OVER`; `n` counts rows)."""
    soft_N = found.soft_N
    sums = {
        "n": found.reward_B.new_tensor(len(found.reward_B) / draws),
        "asked": torch.tensor(len(soft_N), device=soft_N.device),
        "soft": soft_N.sum(),
        "gradient/reward": found.reward_B.sum() / draws,
        "gradient/entropy_weight": values["entropy_weight"][soft_N].sum(),
        "gradient/outside": (soft_N & ~values["inside"]).sum(),
        "gradient/broken": found.broken,
    }
    if "kl_to_reference" in values:
        sums["gradient/kl"] = values["kl_to_reference"].detach().sum()
    if "marginal" in values:
        sums["gradient/marginal"] = kl_by_row(values["marginal"].detach(), state).sum()
        sums["weight"] = row_weights(state).sum()
    return {name: value.float() for name, value in sums.items()}


@dataclass(frozen=True)
class Measured:
    """What a measurement of an update begins with."""

    state: State
    before: Expansion
    soft_ND: Tensor
    dropout_key_B: Tensor


@torch.no_grad()
def came_true(guide: Guide, measured: Measured, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """How the reward of the blend changes with the expected embeddings in `values`: to first order, and in truth.

    Both are sums over rows, in units of the guide's reward. `values` are those of `expected_text` after an update.
    """
    before, state = measured.before, measured.state
    soft_N = before.soft_N & values["some"]
    change_ND = torch.where(soft_N[:, None], values["soft"] - measured.soft_ND, 0.0)
    hidden, known_BCD = _hidden(state, before.soft_N), guide.embedding_VD[state.rollout.completion_BC]
    shown_nD = (before.blend_ND + change_ND)[before.soft_N]
    response_BCD = known_BCD.flatten(0, 1).index_put((hidden.hidden_N,), shown_nD).view_as(known_BCD)
    after_B = guide.reward(response_BCD, state.shown_BC, state.rows_B)
    return first_order(before.g_ND, change_ND), (after_B - before.reward_B).sum()
