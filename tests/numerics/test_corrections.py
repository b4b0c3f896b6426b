"""The correction for guidance by brute force: every trajectory of a toy, its probability under both samplers.

The trajectories, their tokens, steps and log-probabilities come from `denoise` itself, run until it has sampled all of
them. The gradient they should give comes from a recursion over canvases that knows nothing of guidance.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from toys import END, MASK, Toy, V, random_guide, rollout_of, sampled_values

from rgrl.algo.corrections import correction, effective_sample_size, exact, log_ratio
from rgrl.algo.estimators import ESTIMATORS
from rgrl.algo.objectives import OBJECTIVES
from rgrl.config import Config, GuidanceConfig, ObjectiveConfig, RolloutConfig
from rgrl.rollout.denoise import RolloutNoise, denoise
from rgrl.rollout.sampling import certainty, draw_uniform
from rgrl.types import LossInputs

PROMPT, ROWS = [0, 2], 40_000
WORTH = [0.3, -0.8]  # of each word; the text ends at END


def worth(completion):
    """A reward that depends on the order of the words, and on nothing after the end."""
    total = 0.0
    for i, token in enumerate(completion):
        if token == END:
            return total + 0.4 * i
        total += WORTH[token] * (1 + 0.5 * i)
    return total


def toy_of(config):
    return Toy(len(PROMPT) + config.rollout.max_completion_length, scale=0.5, words=(0, 1))


def settings(rule, source="policy", C=3, steps=None, support="guided", eta=0.9, **more):
    rollout = {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "confidence": rule, "confidence_from": source} | more
    return Config(
        rollout=RolloutConfig(max_completion_length=C, steps=steps or C, **rollout),
        guidance=GuidanceConfig(kind="expectation", steps=1, eta=eta, support=support),
    )


def trajectories(toy, config):
    """One rollout of each trajectory that the guided sampler can take, and its probability, from what was recorded."""
    masked = random_guide(V, config.guidance, dtype=torch.float64)
    # A reward that also sees what follows a likely end, so that every place is steered.
    guide = replace(masked, reward=lambda x_BCD, a_BC, rows_B: masked.reward(x_BCD, torch.ones_like(a_BC), rows_B))
    prompt_BL = torch.tensor([PROMPT] * ROWS)
    C, T = config.rollout.max_completion_length, config.rollout.steps
    rng = torch.Generator().manual_seed(0)  # one for all rows: many generators take long
    noise = RolloutNoise(*(draw_uniform(shape, rng) for shape in ((ROWS, T, C), (ROWS, T, C), (ROWS, T, 1, C))))
    made = denoise(toy, prompt_BL, torch.ones_like(prompt_BL, dtype=torch.bool), config.rollout, noise, guide)
    keys = torch.cat([made.completion_BC, made.unmask_step_BC], 1).where(made.decided_BC.repeat(1, 2), -1)
    first = {tuple(key): b for b, key in reversed(list(enumerate(keys.tolist())))}
    rollout = made.rows(torch.tensor(sorted(first.values())))
    logq_B = torch.where(rollout.decided_BC, rollout.behaviour_logp_BC, 0.0).sum(1).double()
    if config.rollout.confidence == "origin":  # any order, whatever was sampled
        for b, step_C in enumerate(torch.where(rollout.decided_BC, rollout.unmask_step_BC, 99).tolist()):
            left = block = config.rollout.block_length or C
            for t in range(max(s for s in step_C if s < 99) + 1):
                left = block if t % (T * block // C) == 0 else left
                k = step_C.count(t)
                logq_B[b] -= math.log(math.comb(left, k))
                left -= k
    return rollout, logq_B.exp()


def value_of(toy, config, completion=None, t=0):
    """The expected reward of the unguided sampler, differentiable, by recursion over its choices."""
    r = config.rollout
    C = r.max_completion_length
    completion = completion or [MASK] * C
    text = completion[: completion.index(END)] if END in completion else completion
    if MASK not in text:
        return torch.tensor(worth(completion), dtype=torch.float64)
    block = r.block_length or C
    steps = r.steps * block // C  # of a block
    i, s = divmod(t, steps)
    hidden = [c for c in range((i + 1) * block) if completion[c] == MASK]
    k = len(hidden) - -(-block * (steps - s - 1) // steps)
    ids = torch.tensor([PROMPT + completion])
    at_N = len(PROMPT) + torch.tensor(hidden)
    logits_NV = toy.logits(ids, torch.ones_like(ids, dtype=torch.bool), at_N)
    scaled_NV = logits_NV / r.temperature
    if r.top_k:
        scaled_NV = scaled_NV.masked_fill(scaled_NV < scaled_NV.topk(r.top_k).values[:, -1:], float("-inf"))
    if r.top_p < 1:
        likely_NV, token_NV = scaled_NV.softmax(-1).sort(-1, descending=True)
        enough_NV = likely_NV.cumsum(-1) - likely_NV >= r.top_p
        scaled_NV = scaled_NV.masked_fill(torch.zeros_like(enough_NV).scatter(1, token_NV, enough_NV), float("-inf"))
    p_NV = scaled_NV.softmax(-1)
    if r.confidence == "origin":
        chosen_sets = list(itertools.combinations(range(len(hidden)), k))
    else:
        p = p_NV.detach()
        best = p.sort(-1, descending=True).values
        sure_N = best[:, 0] - best[:, 1] if r.confidence == "topk_margin" else torch.special.entr(p).sum(-1).neg()
        # Equally sure: the one whose best token is likelier untempered, then the leftmost.
        likely_N = logits_NV.detach().softmax(-1).amax(-1)
        order = sorted(range(len(hidden)), key=lambda n: (-sure_N[n].item(), -likely_N[n].item(), n))
        chosen_sets = [tuple(order[:k])]
    total = torch.zeros((), dtype=torch.float64)
    for chosen in chosen_sets:
        for tokens in itertools.product([v for v in range(V) if v != MASK], repeat=k):
            probability = math.prod([p_NV[n, v] for n, v in zip(chosen, tokens, strict=True)]) / len(chosen_sets)
            if probability > 0:
                following = list(completion)
                for n, v in zip(chosen, tokens, strict=True):
                    following[hidden[n]] = v
                total = total + probability * value_of(toy, config, following, t + 1)
    return total


def gradient(toy, rollout, q_B, config, objective):
    """The trainer's own gradient over all trajectories, each weighted by its probability under the guided sampler."""
    r, estimator = config.rollout, ESTIMATORS["trajectory"]
    noise = estimator.draw(rollout, objective, [None] * len(q_B))
    l_BC = estimator.estimate(sampled_values(toy, r), rollout, noise, MASK, objective, q_B)["logp"]
    reward_B = torch.tensor([worth(completion) for completion in rollout.completion_BC.tolist()]).double()
    out = OBJECTIVES["reinforce"].loss(
        LossInputs(l_BC, noise.count_BC, q_B * reward_B, correction_BC=correction(rollout, objective)), objective
    )
    return flat_gradient(toy, -out.loss_sum)


def flat_gradient(toy, value):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(toy.parameters()))])


FULL = ObjectiveConfig(correction="truncate", correction_level="sequence", correction_max=math.inf)
RIGHT = [
    settings("entropy"),
    settings("topk_margin"),
    settings("origin"),
    settings("origin", source="guided"),
    settings("entropy", steps=2),
    settings("origin", steps=2),
    settings("entropy", support="policy", top_k=2),
    settings("topk_margin", support="policy", top_k=2),
    settings("entropy", C=4, eta=0.5, block_length=2, block_cache=False),
    settings("topk_margin", C=4, steps=2, block_length=2, block_cache=False, support="policy", top_k=2),
    settings("origin", C=4, eta=0.5, block_length=2, block_cache=False, support="policy", top_k=2),
]


def name_of(config):
    r = config.rollout
    return f"{r.confidence}-{r.steps}-{r.top_k}-{r.block_length}"


@pytest.mark.parametrize("config", RIGHT, ids=name_of)
def test_fully_corrected_guided_samples_give_the_on_policy_gradient(config):
    assert exact(config)
    toy, C = toy_of(config), config.rollout.max_completion_length
    rollout, q_B = trajectories(toy, config)
    assert q_B.sum().item() == pytest.approx(1, abs=1e-5), "these are all trajectories"
    assert (rollout.decided_BC & ~rollout.completion_mask_BC).any(), "tokens after the end are part of it"
    if config.rollout.steps == C:
        assert (rollout.unmask_step_BC == C).any(), "and some texts were final early"
    # Under the policy they are all trajectories too.
    c_B = log_ratio(rollout, "sequence").double().exp()
    assert (q_B * c_B).sum().item() == pytest.approx(1, abs=1e-5)

    truth = flat_gradient(toy, value_of(toy, config))
    corrected = gradient(toy, rollout, q_B, config, FULL)
    assert truth.abs().max() > 0.05
    torch.testing.assert_close(corrected, truth, rtol=0, atol=1e-4)
    # Without correction the gradient is another one, and with a truncated correction it lies between.
    bias = (gradient(toy, rollout, q_B, config, ObjectiveConfig()) - truth).norm() / truth.norm()
    truncated = ObjectiveConfig(correction="truncate", correction_level="sequence", correction_max=1.5)
    less = (gradient(toy, rollout, q_B, config, truncated) - truth).norm() / truth.norm()
    assert bias > 0.2 and 1e-3 < less < bias


@pytest.mark.parametrize(
    "config", [settings("maskgit_plus"), settings("entropy", source="guided"), settings("entropy", defer_eos=True)]
)
def test_an_order_that_looks_at_what_was_sampled_or_steered_is_not_called_exact(config):
    assert not exact(config)
    toy = toy_of(config)
    rollout, q_B = trajectories(toy, config)
    c_B = log_ratio(rollout, "sequence").double().exp()
    # Either the record is not the trajectory's probability, or the policy would have taken another order.
    truth = flat_gradient(toy, value_of(toy, settings("entropy")))
    wrong = (gradient(toy, rollout, q_B, config, FULL) - truth).norm() / truth.norm()
    assert abs(q_B.sum() - 1) > 0.01 or abs((q_B * c_B).sum() - 1) > 0.01 or wrong > 0.01


def test_a_truncation_of_the_steered_logits_is_not_called_exact_for_it_is_not():
    config = settings("entropy", top_k=2, eta=3.0)
    assert not exact(config) and exact(settings("entropy", support="policy", top_k=2))
    rollout, q_B = trajectories(toy_of(config), config)
    ratio_B = log_ratio(rollout, "sequence").double()
    assert q_B.sum().item() == pytest.approx(1, abs=1e-5)
    assert (ratio_B == -math.inf).any(), "tokens that the policy cannot write"
    assert (q_B * ratio_B.exp()).sum() < 0.99, "and tokens that the guided sampler cannot"


def test_equally_confident_places_leave_it_exact(monkeypatch):
    # The nucleus leaves one token at many places of this toy, and which of them is written first matters.
    config = settings("entropy", C=4, support="policy", top_p=0.7)
    assert exact(config)
    toy = Toy(len(PROMPT) + 4, seed=24, words=(0, 1))
    truth = flat_gradient(toy, value_of(toy, config))

    def error():
        rollout, q_B = trajectories(toy, config)
        c_B = log_ratio(rollout, "sequence").double().exp()
        assert q_B.sum().item() == pytest.approx(1, abs=1e-5) and (q_B * c_B).sum().item() == pytest.approx(1, abs=1e-5)
        return (gradient(toy, rollout, q_B, config, FULL) - truth).abs().max()

    assert truth.abs().max() > 0.05 and error() < 1e-4
    monkeypatch.setattr("rgrl.rollout.denoise.certainty", lambda *own: -certainty(*own))
    assert error() > 0.1


class Caching(Toy):
    """What it tells of a place is the mean over the canvas and the one from which its cache was filled."""

    def logits(self, canvas_BL, attention_BL, at, prefix=None):
        logits_NV = super().logits(canvas_BL, attention_BL, at)
        if prefix is None:
            return logits_NV
        prefix.layers = prefix.layers or [(canvas_BL, canvas_BL)]
        return (logits_NV + super().logits(prefix.layers[0][0], attention_BL, at)) / 2


def test_a_cache_leaves_the_ratio_exact_but_not_the_trajectory_estimator():
    toy, blocks = Caching(len(PROMPT) + 4, scale=0.5, words=(0, 1)), {"C": 4, "eta": 0.5, "block_length": 2}
    errors = []
    for block_cache in (False, True):
        config = settings("entropy", **blocks, block_cache=block_cache)
        assert exact(config)
        rollout, q_B = trajectories(toy, config)
        c_B = log_ratio(rollout, "sequence").double().exp()
        assert q_B.sum().item() == pytest.approx(1, abs=1e-5)
        assert (q_B * c_B).sum().item() == pytest.approx(1, abs=1e-5)
        truth = flat_gradient(toy, value_of(toy, config))  # of the sampler that reads the whole canvas
        errors.append((gradient(toy, rollout, q_B, config, FULL) - truth).norm() / truth.norm())
    assert errors[0] < 1e-4 and errors[1] > 1e-2


# ----------------------------------------------------------------------------------------------- by hand
def three_rows():
    """c per token: row 0 is final with its third token; row 1 has a token that the policy cannot write."""
    policy_BC = torch.tensor([[-1.0, -2.0, -0.5, -9.0], [-1.0, -math.inf, -1.0, -1.0], [-0.2, -0.3, -0.1, -0.4]])
    behaviour_BC = torch.tensor([[-0.5, -2.5, -0.5, -1.0], [-1.0, -1.0, -1.0, -1.0], [-0.2, -0.3, -0.1, -0.4]])
    mask_BC = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    step_BC = torch.tensor([[0, 2, 1, 4], [0, 1, 2, 3], [3, 2, 1, 0]])
    return rollout_of(torch.zeros_like(step_BC), mask_BC, None, step_BC, behaviour_BC, policy_BC)


def test_corrections_by_hand():
    rollout, e = three_rows(), math.exp
    c = [e(-0.5), e(0.5), 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert log_ratio(rollout, "token").exp().flatten().tolist() == pytest.approx(c)
    assert log_ratio(rollout, "sequence").exp().tolist() == pytest.approx([1, 0, 1])
    assert correction(rollout, ObjectiveConfig()).eq(1).all()
    cut = correction(rollout, ObjectiveConfig(correction="truncate", correction_max=1.2))
    assert cut.flatten().tolist() == pytest.approx([e(-0.5), 1.2, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1])
    band = correction(rollout, ObjectiveConfig(correction="mask", correction_min=0.8, correction_max=1.2))
    assert band.flatten().tolist() == pytest.approx([0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1])
    whole = correction(rollout, ObjectiveConfig(correction="mask", correction_level="sequence"))
    assert whole.flatten().tolist() == pytest.approx([1] * 4 + [0] * 4 + [1] * 4)


def test_effective_sample_size():
    assert effective_sample_size(torch.ones(5)).item() == pytest.approx(1)
    assert effective_sample_size(torch.tensor([1.0, 0, 0, 0])).item() == pytest.approx(0.25)
    assert effective_sample_size(torch.zeros(3)).item() == 0
