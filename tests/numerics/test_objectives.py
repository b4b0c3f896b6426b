"""Advantages, estimators and objectives: by hand, by brute force, and against finite differences in float64."""

import math
from dataclasses import replace

import pytest
import torch
from checkpoints import PROMPTS

from rgrl.algo.advantages import ADVANTAGES, centred, leave_one_out, zero_spread, zscore
from rgrl.algo.estimators import ESTIMATORS, draw_one_step, masked_nll, only_logp
from rgrl.algo.objectives import OBJECTIVES, grpo, k3, likelihood, reinforce, weighted
from rgrl.config import LoraConfig, ObjectiveConfig, RolloutConfig
from rgrl.models import add_lora, load_policy
from rgrl.models.lora import adapter_parameters
from rgrl.rollout import generate
from rgrl.seeds import generators
from rgrl.types import LossInputs

# Objectives


def loss_inputs(logp_BC=None, ref=False, old=True, correction=True, by_sequence=False, dtype=torch.float64):
    """Four rows of five tokens, of different lengths, with ratios on both sides of the clipping band."""
    rng = torch.Generator().manual_seed(0)
    old_BC = -torch.rand(4, 5, generator=rng).to(dtype) - 0.2
    new_BC = old_BC + 0.4 * torch.randn(4, 5, generator=rng).to(dtype)
    ref_BC = old_BC + 0.5 * torch.randn(4, 5, generator=rng).to(dtype)
    mask_BC = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    correction_BC = 0.5 + torch.rand(4, 5, generator=rng).to(dtype)
    if by_sequence:
        correction_BC[:] = correction_BC[:, :1]
    return LossInputs(
        logp_BC=new_BC if logp_BC is None else logp_BC,
        mask_BC=mask_BC,
        advantage_B=torch.tensor([1.5, -1.0, 0.7, -0.3], dtype=dtype),
        by_sequence=by_sequence,
        old_logp_BC=old_BC if old else None,
        ref_logp_BC=ref_BC if ref else None,
        correction_BC=correction_BC if correction else None,
        readouts={"cross_entropy_to_old": torch.rand(4, 5, generator=rng).to(dtype)},
    )


# Every objective, and those that know a ratio of whole completions also with it.
CASES = [(name, "token") for name in OBJECTIVES] + [("grpo", "sequence"), ("reinforce", "sequence")]


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("name", "level"), CASES)
def test_gradient_equals_finite_differences(name, level, beta):
    config = ObjectiveConfig(beta=beta, level=level)

    def loss(logp_BC):
        out = OBJECTIVES[name].loss(loss_inputs(logp_BC, ref=beta > 0, by_sequence=level == "sequence"), config)
        return out.loss_sum / out.denominator

    start_BC = loss_inputs().logp_BC.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, start_BC, eps=1e-6, atol=1e-7)
    (g_BC,) = torch.autograd.grad(loss(start_BC), start_BC)
    assert (g_BC[~loss_inputs().mask_BC] == 0).all() and g_BC.abs().max() > 0.01


def by_hand(name, x, config):
    """Loss sum and denominator with loops, from the formulas of section 4 of the method."""

    def clipped(rho, A):
        return -min(rho * A, min(max(rho, 1 - config.epsilon_low), 1 + config.epsilon_high) * A)

    by_row = name in ("likelihood", "weighted", "wd1", "dmpo", "gdsd", "tilt_matching") or (
        name == "grpo" and config.level == "sequence"
    )
    total, tokens = 0.0, 0
    for b in range(4):
        length, A, value, kl = int(x.mask_BC[b].sum()), x.advantage_B[b].item(), 0.0, 0.0
        new, old, c = (t[b].tolist() for t in (x.logp_BC, x.old_logp_BC, x.correction_BC))
        for i in range(length):
            if name == "likelihood":
                value += -new[i] / length
            elif name in ("weighted", "dmpo"):
                value += -A * c[i] * new[i] / length
            elif name == "tilt_matching":  # with c = config.control
                cross = x.readouts["cross_entropy_to_old"][b, i].item()
                value += (config.control * cross - (A + 1 - config.control) * c[i] * new[i]) / length
            elif name == "gdsd":
                pass
            elif name == "grpo" and config.level == "token":
                value += c[i] * clipped(math.exp(new[i] - old[i]), A)
            elif name != "grpo":
                value += -A * c[i] * new[i]
        if name == "grpo" and config.level == "sequence":
            value = c[0] * clipped(math.exp(sum(new[i] - old[i] for i in range(length)) / length), A)
        if name == "gdsd":
            gap = sum(new[i] - old[i] for i in range(length)) / 5
            value = c[0] * (gap - A / config.weight_temperature) ** 2
        if x.ref_logp_BC is not None:
            d = [x.ref_logp_BC[b, i].item() - new[i] for i in range(length)]
            if x.by_sequence:
                d = [sum(d) / length] * length
            kl = sum(math.exp(e) - e - 1 for e in d)
        total += value + config.beta * (kl / length if by_row else kl)
        tokens += length
    return total, 4 if by_row else tokens


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("name", "level"), CASES)
def test_loss_equals_the_formula(name, level, beta):
    config = ObjectiveConfig(
        beta=beta, epsilon_low=0.1, epsilon_high=0.3, level=level, control=0.6, weight_temperature=0.7
    )
    x = loss_inputs(ref=beta > 0, by_sequence=level == "sequence")
    out = OBJECTIVES[name].loss(x, config)
    total, denominator = by_hand(name, x, config)
    assert out.loss_sum.item() == pytest.approx(total, rel=1e-10)
    assert out.denominator.item() == denominator
    assert ("kl" in out.metrics) == (beta > 0)


@pytest.mark.parametrize(("name", "level"), CASES)
def test_the_kl_over_the_whole_vocabulary_takes_the_place_of_k3(name, level):
    config = ObjectiveConfig(beta=0.3, level=level, kl="full")
    kl_BC = torch.rand(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = loss_inputs(by_sequence=level == "sequence")
    x = replace(x, readouts={**x.readouts, "kl_to_reference": kl_BC})
    out, without = OBJECTIVES[name].loss(x, config), OBJECTIVES[name].loss(x, replace(config, beta=0.0))
    by_row = without.denominator == 4
    kl = sum((kl_BC[b, :n].mean() if by_row else kl_BC[b, :n].sum()).item() for b, n in enumerate((5, 3, 1, 4)))
    assert out.loss_sum.item() == pytest.approx(without.loss_sum.item() + 0.3 * kl)
    assert out.metrics["kl"].item() == pytest.approx(kl) and "kl" not in without.metrics


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_needs_only_what_it_declares(name):
    needs_old, needs_behaviour = "old" in OBJECTIVES[name].needs, "behaviour" in OBJECTIVES[name].needs
    out = OBJECTIVES[name].loss(loss_inputs(old=needs_old, correction=needs_behaviour), ObjectiveConfig())
    assert torch.isfinite(out.loss_sum)
    assert needs_old == (name in ("grpo", "gdsd")) and needs_behaviour == (name != "likelihood")
    # And it does use what it declares.
    if needs_behaviour:
        assert out.loss_sum != OBJECTIVES[name].loss(loss_inputs(correction=False), ObjectiveConfig()).loss_sum


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_lies_past_the_end_token_does_not_count(name):
    objective, config = OBJECTIVES[name], ObjectiveConfig(beta=0.1)
    x = loss_inputs(ref=True)
    outside = ~x.mask_BC
    y = loss_inputs(x.logp_BC.masked_fill(outside, -50.0), ref=True)
    assert objective.loss(x, config).loss_sum == objective.loss(y, config).loss_sum


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pieces_of_a_batch_add_up_to_the_whole(name):
    # What makes one process with 8 micro-batches the same as 8 processes with one.
    objective, config, x = OBJECTIVES[name], ObjectiveConfig(beta=0.1), loss_inputs(ref=True)
    whole = objective.loss(x, config)
    pieces = []
    for rows in (slice(0, 1), slice(1, 4)):
        tensors = {k: v[rows] for k, v in vars(x).items() if torch.is_tensor(v)}
        readouts = {k: v[rows] for k, v in x.readouts.items()}
        pieces.append(objective.loss(LossInputs(**tensors, readouts=readouts), config))
    assert sum(p.loss_sum for p in pieces).item() == pytest.approx(whole.loss_sum.item())
    assert sum(p.denominator for p in pieces) == whole.denominator
    for key, value in whole.metrics.items():
        assert sum(p.metrics[key] for p in pieces).item() == pytest.approx(value.item())


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope", "low", "high"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (1.1, 2.0, -2.2, -2.2, 0, 0),  # inside the band
        (1.5, 2.0, -2.6, 0.0, 0, 1),  # good and already likelier: held at 1 + 0.3
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # good but less likely: pulled back in full
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # bad and already less likely: held at 1 - 0.2
        (1.5, -2.0, 3.0, 3.0, 0, 0),  # bad but likelier: pushed back in full
    ],
)
def test_grpo_clipping(ratio, advantage, value, slope, low, high):
    logp_BC = torch.tensor([[-1.0 + math.log(ratio)]], requires_grad=True)
    x = LossInputs(logp_BC, torch.tensor([[True]]), torch.tensor([advantage]), old_logp_BC=torch.tensor([[-1.0]]))
    out = grpo(x, ObjectiveConfig(epsilon_low=0.2, epsilon_high=0.3))
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(value, rel=1e-5)
    assert logp_BC.grad.item() == pytest.approx(slope, rel=1e-5)
    assert (out.metrics["clip_ratio/low"].item(), out.metrics["clip_ratio/high"].item()) == (low, high)
    assert out.metrics["ratio"].item() == pytest.approx(ratio)


def test_k3_is_never_negative_and_zero_only_at_equality():
    logp = torch.linspace(-8, 0, 81, dtype=torch.float64)
    value = k3(logp[:, None], logp[None, :])
    same = torch.eye(81, dtype=torch.bool)
    assert (value[same] == 0).all()
    assert (value[~same] > 0).all()


def test_k3_is_on_average_the_kl_divergence():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    expected = (p * (p / q).log()).sum()
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx(expected.item())


# Advantages


def test_advantages_by_hand():
    reward_B = torch.tensor([1.0, 2.0, 6.0, -1.0, 0.0, 4.0])  # two groups of three
    assert centred(reward_B, 3, ObjectiveConfig()).tolist() == pytest.approx([-2, -1, 3, -2, -1, 3])
    assert leave_one_out(reward_B, 3, ObjectiveConfig()).tolist() == pytest.approx([-3, -1.5, 4.5, -3, -1.5, 4.5])
    deviation = math.sqrt((4 + 1 + 9) / 2)
    expected = [a / deviation for a in (-2, -1, 3, -2, -1, 3)]
    assert zscore(reward_B, 3, ObjectiveConfig()).tolist() == pytest.approx(expected, rel=1e-3)


def test_group_weights_by_hand():
    reward_B, config = torch.tensor([1.0, 2.0, 6.0, -1.0, 0.0, 4.0]), ObjectiveConfig(weight_temperature=2.0)
    expected, expected_wd1 = [], []
    for group in ([1.0, 2.0, 6.0], [-1.0, 0.0, 4.0]):
        up = [math.exp(r / 2) for r in group]
        down = [math.exp(-r / 2) for r in group]
        expected += [3 * w / sum(up) for w in up]
        expected_wd1 += [3 * (u / sum(up) - d / sum(down)) for u, d in zip(up, down, strict=True)]
    assert ADVANTAGES["reward_weighted"](reward_B, 3, config).tolist() == pytest.approx(expected, rel=1e-5)
    assert ADVANTAGES["wd1"](reward_B, 3, config).tolist() == pytest.approx(expected_wd1, rel=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_group_without_spread_teaches_nothing(name):
    # 0.1 three times has a mean that is not 0.1 in float32: only silencing makes it exactly zero.
    reward_B = torch.tensor([0.1, 0.1, 0.1, 3.0, 3.0, 3.5, -7.0, -7.0, -7.0])
    advantage_B = ADVANTAGES[name](reward_B, 3, ObjectiveConfig())
    assert zero_spread(reward_B, 3).tolist() == [True, False, True]
    assert (advantage_B[[0, 1, 2, 6, 7, 8]] == 0).all()
    if name == "reward_weighted":  # weights, all positive
        assert advantage_B[5] > advantage_B[3] > 0 and advantage_B.sum().item() == pytest.approx(3)
    else:
        assert advantage_B[5] > 0 > advantage_B[3]
        assert advantage_B.sum().item() == pytest.approx(0, abs=1e-5)


def test_whether_a_group_has_spread_does_not_depend_on_the_unit_of_rewards():
    reward_B = torch.tensor([0.1, 0.1 + 1e-8, 0.0, 0.0, 0.2, 0.3])
    for unit in (1e-9, 1.0, 3e7):
        assert zero_spread(unit * reward_B, 2).tolist() == [True, True, False]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_groups_do_not_see_each_other(name):
    one, two = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([100.0, 90.0, 95.0])
    together = ADVANTAGES[name](torch.cat([one, two]), 3, ObjectiveConfig())
    apart = torch.cat([ADVANTAGES[name](x, 3, ObjectiveConfig()) for x in (one, two)])
    assert torch.equal(together, apart)


# Estimators


@pytest.fixture(scope="module")
def policy(family_dir):
    return add_lora(load_policy(family_dir), LoraConfig(r=4, alpha=8), seed=0)


@pytest.fixture(scope="module")
def rollout(policy):
    made = generate(policy, PROMPTS[:4], RolloutConfig(max_completion_length=8, steps=4))
    made.canvas_BL[1, -5] = made.canvas_BL[2, -8] = policy.eos_id  # rows of different lengths, one of a single token
    ended_BC = (made.completion_BC == policy.eos_id).long()
    mask_BC = ended_BC.cumsum(1) - ended_BC == 0
    assert mask_BC.sum(1).tolist() == [8, 4, 1, 8]
    return replace(made, completion_mask_BC=mask_BC)


def estimate(policy, rollout, noise, name="one_step", advantage_B=None):
    advantage_B = torch.ones(len(rollout.canvas_BL)) if advantage_B is None else advantage_B
    fixed = policy.mask_id, ObjectiveConfig(), advantage_B
    return ESTIMATORS[name].estimate(only_logp(policy.logp), rollout, noise, *fixed)["logp"]


def noise_for(rollout, prompt_mask=0.3, seed=3):
    config = ObjectiveConfig(prompt_mask=prompt_mask)
    return draw_one_step(rollout, config, generators(seed, 0, range(4), "noise"))


def test_one_step_equals_a_loop_over_rows_and_tokens(policy, rollout):
    noise = noise_for(rollout)
    with torch.no_grad():
        fast_BC = estimate(policy, rollout, noise)
        for b in range(4):
            real = rollout.attention_BL[b]  # one row at a time, without its padding
            ids = rollout.canvas_BL[b][real]
            canvas = ids.clone()
            canvas[noise.hidden_KBL[0, b][real]] = policy.mask_id
            logits_LV = policy.logits(canvas[None], torch.ones_like(canvas[None], dtype=torch.bool))[0].double()
            for c in range(8):
                expected = 0.0
                if rollout.completion_mask_BC[b, c]:
                    scores = logits_LV[len(ids) - 8 + c]
                    expected = (scores[ids[len(ids) - 8 + c]] - scores.exp().sum().log()).item()
                assert fast_BC[b, c].item() == pytest.approx(expected, abs=1e-5)
    assert fast_BC.dtype == torch.float32


def test_one_step_hides_the_completion_and_a_fraction_of_the_prompt(rollout):
    def prompt_fraction(noise):
        real_BL = rollout.attention_BL[:, :-8]
        return noise.hidden_KBL[0, :, :-8][real_BL].float().mean().item()

    assert prompt_fraction(noise_for(rollout, 0.0)) == 0
    fractions = []
    for seed in range(200):
        noise = noise_for(rollout, 0.3, seed)
        assert noise.hidden_KBL.shape == (1, *rollout.canvas_BL.shape)
        assert noise.hidden_KBL[0, :, -8:].all()
        assert not (noise.hidden_KBL[0] & ~rollout.attention_BL).any()  # padding is not a prompt
        fractions.append(prompt_fraction(noise))
    assert 0.25 < sum(fractions) / 200 < 0.35
    assert torch.equal(noise_for(rollout).hidden_KBL, noise_for(rollout).hidden_KBL)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_ratio_is_exactly_1_and_kl_exactly_0_before_the_first_update(name, policy, rollout):
    estimator, config = ESTIMATORS[name], ObjectiveConfig(beta=0.1, level=ESTIMATORS[name].level)
    noise = estimator.draw(rollout, config, generators(0, 0, range(4), "noise"))
    advantage_B = torch.tensor([1.0, -0.5, 2.0, -1.5])
    with torch.no_grad():
        old_BC = estimate(policy, rollout, noise, name, advantage_B)
        with policy.reference():
            ref_BC = estimate(policy, rollout, noise, name, advantage_B)
    new_BC = estimate(policy, rollout, noise, name, advantage_B)
    assert torch.equal(old_BC, ref_BC) and torch.equal(old_BC, new_BC.detach())
    assert new_BC.dtype == torch.float32 and (new_BC[noise.count_BC] < 0).any() and new_BC.isfinite().all()

    mask_BC, parameters = noise.count_BC, list(adapter_parameters(policy).values())
    by_sequence = estimator.level == "sequence"
    x = LossInputs(new_BC, mask_BC, advantage_B, by_sequence, old_logp_BC=old_BC, ref_logp_BC=ref_BC)
    out = grpo(x, config)
    assert out.metrics["ratio"] == out.denominator and out.metrics["kl"] == 0
    assert out.denominator == (4 if by_sequence else mask_BC.sum()) and (out.samples["ratio"] == 1).all()
    clipped = torch.autograd.grad(out.loss_sum, parameters, retain_graph=True)
    unclipped = weighted if by_sequence else reinforce
    plain = torch.autograd.grad(unclipped(x, config).loss_sum, parameters)
    assert sum(g.abs().sum() for g in plain) > 0.1
    for one, two in zip(clipped, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_reference_is_the_frozen_base_once_the_adapter_has_moved(dream_dir, rollout):
    moved = add_lora(load_policy(dream_dir), LoraConfig(r=4, alpha=8), seed=0)
    noise = noise_for(rollout)
    with torch.no_grad():
        base_BC = estimate(moved, rollout, noise)
        for p in adapter_parameters(moved).values():
            p.add_(0.1)
        new_BC = estimate(moved, rollout, noise)
        with moved.reference():
            ref_BC = estimate(moved, rollout, noise)
    assert torch.equal(ref_BC, base_BC)
    assert (new_BC - base_BC).abs().max() > 0.01


def test_likelihood_gradient_reaches_the_adapter_alone(policy, rollout):
    new_BC = estimate(policy, rollout, noise_for(rollout))
    x = LossInputs(new_BC, rollout.completion_mask_BC, torch.zeros(4))
    likelihood(x, ObjectiveConfig()).loss_sum.backward()
    named = dict(policy.named_parameters())
    touched = {name for name, p in named.items() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    assert touched and all("lora_" in name for name in touched)


def test_masked_nll_by_hand(policy, rollout):
    rngs = generators(7, 0, range(4), "nll")
    with torch.no_grad():
        total, count = masked_nll(policy.logp, rollout, generators(7, 0, range(4), "nll"), policy.mask_id)
        expected_total, expected_count = 0.0, 0
        for rate in (0.25, 0.5, 0.75):
            u_BC = torch.stack([torch.rand(8, generator=rng) for rng in rngs])
            for b in range(4):
                canvas, hidden = rollout.canvas_BL[b].clone(), []
                for c in range(8):
                    counts = bool(rollout.completion_mask_BC[b, c])
                    if counts and u_BC[b, c] < rate:
                        hidden.append(c)
                    if c in hidden or not counts:  # what follows the end token must not be seen
                        canvas[-8 + c] = policy.mask_id
                logits_LV = policy.logits(canvas[None], rollout.attention_BL[b : b + 1])[0].double()
                for c in hidden:
                    scores, token = logits_LV[-8 + c], rollout.canvas_BL[b, -8 + c]
                    expected_total += (scores.exp().sum().log() - scores[token]).item()
                    expected_count += 1
    assert count.item() == expected_count > 10
    assert total.item() == pytest.approx(expected_total, rel=1e-5)
