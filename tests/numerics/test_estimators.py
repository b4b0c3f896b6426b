"""Estimators by brute force: averaged over all their noise they are what they claim to be.

Each `draw` gets uniform numbers that this file makes: one row for every case that the noise can take, with its
probability. What a mean over t is taken of is a polynomial in t, which five Gauss-Legendre nodes integrate exactly.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from checkpoints import PROMPTS
from toys import END, MASK, Toy, V, random_guide, roll_out, rollout_of, sampled_values

from rgrl.algo.estimators import ESTIMATORS, gauss_legendre, only_logp
from rgrl.config import GuidanceConfig, ObjectiveConfig, RolloutConfig
from rgrl.rollout import generate
from rgrl.rollout.sampling import sampled_logp
from rgrl.types import NoiseDraw

C, PROMPT = 4, 2
TOKENS = {4: [0, 2, 1, 0], 3: [1, 1, END, 0], 1: [END, 2, 2, 1]}  # completions by their length, end token included


@pytest.fixture(scope="module")
def toy():
    return Toy(PROMPT + C)


def copies(n, rows=1, step_C=(0, 0, 0, 0)):
    """`rows` copies of the completion of length n."""
    mask_BC = (torch.arange(C) < n).expand(rows, C)
    return rollout_of(torch.tensor([[0, 1] + TOKENS[n]] * rows), mask_BC, step_BC=torch.tensor([step_C] * rows))


def estimate(name, policy, rollout, noise, config, advantage_B):
    estimator, mask_id = ESTIMATORS[name], policy.mask_id
    return estimator.estimate(only_logp(policy.logp), rollout, noise, mask_id, config, advantage_B)["logp"]


def single(toy, n, shown):
    """Log-probability of each token of the completion on the canvas that shows `shown` of it."""
    ids = [0, 1] + [token if i in shown else MASK for i, token in enumerate(TOKENS[n])]
    at_BL = torch.arange(PROMPT + C)[None] >= PROMPT
    with torch.no_grad():
        logits_CV = toy.logits(torch.tensor([ids]), torch.ones(1, PROMPT + C, dtype=torch.bool), at_BL)
    return [logits_CV[i].log_softmax(-1)[token].item() for i, token in enumerate(TOKENS[n])]


def elbo_of(toy, n, tokens, shown=()):
    """The mean over all orders of writing `tokens` of the log-probability of doing so: the evidence lower bound."""
    total = 0.0
    for order in itertools.permutations(tokens):
        for j, i in enumerate(order):
            total += single(toy, n, {*shown, *order[:j]})[i]
    return total / math.factorial(len(tokens))


def nodes(low=0.0, high=1.0):
    """(t, its weight) such that polynomials of degree 9 are integrated exactly."""
    x, w = np.polynomial.legendre.leggauss(5)
    return [(low + (high - low) * (1 + a) / 2, b / 2) for a, b in zip(x, w, strict=True)]


def mask_cases(t):
    """For each set of tokens that may be hidden at rate t: uniform numbers that hide it, and its probability."""
    for hidden in itertools.product([True, False], repeat=C):
        yield [t / 2 if h else (1 + t) / 2 for h in hidden], math.prod(t if h else 1 - t for h in hidden)


def order_cases():
    """Every ranking of the tokens, all alike."""
    return [([(1 + r) / (C + 1) for r in ranks], 1 / 24) for ranks in itertools.permutations(range(C))]


def mean_of(toy, name, n, cases, monkeypatch, step_C=(0, 0, 0, 0), advantage=1.0, **config):
    """Mean of l_C over cases ([uniform numbers of each call of `torch.rand`], probability)."""
    config = ObjectiveConfig(**config)
    feeds = [iter(numbers) for numbers, _ in cases]  # instead of random generators

    def rand(shape, generator):
        u = torch.tensor(next(generator))
        assert u.shape == shape, "the test feeds what `draw` asks for"
        return u

    rollout, probability_B = copies(n, len(cases), step_C), torch.tensor([p for _, p in cases]).double()
    assert probability_B.sum().item() == pytest.approx(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        noise = ESTIMATORS[name].draw(rollout, config, feeds)
    assert not [feed for feed in feeds if next(feed, None) is not None]
    l_BC = estimate(name, toy, rollout, noise, config, torch.full((len(cases),), advantage))
    return (probability_B[:, None] * l_BC).sum(0).detach(), noise, probability_B


LENGTHS = pytest.mark.parametrize("n", TOKENS)


@LENGTHS
@pytest.mark.parametrize("K", [1, 2])
def test_elbo(toy, n, K, monkeypatch):
    cases = [
        ([[u], list(masks)], weight * math.prod(p))
        for u, weight in nodes()
        for masks, p in (
            zip(*case, strict=True) for case in itertools.product(*(list(mask_cases((u + k) / K)) for k in range(K)))
        )
    ]
    mean_C, _, _ = mean_of(toy, "elbo", n, cases, monkeypatch, draws=K)
    assert mean_C.sum().item() == pytest.approx(elbo_of(toy, n, range(n)), abs=1e-5)


@LENGTHS
def test_quadrature_needs_no_random_t(toy, n, monkeypatch):
    # Two nodes are exact up to four tokens; three would be up to six.
    for N in (2, 3):
        t = gauss_legendre(N)[0].tolist()
        cases = [
            ([[case[k][0] for k in range(N)]], math.prod(case[k][1] for k in range(N)))
            for case in itertools.product(*(list(mask_cases(x)) for x in t))
        ]
        mean_C, _, _ = mean_of(toy, "quadrature", n, cases, monkeypatch, draws=N)
        assert mean_C.sum().item() == pytest.approx(elbo_of(toy, n, range(n)), abs=1e-5)


def test_gauss_legendre_nodes_are_those_of_the_method():
    for N, t, w in (
        (1, [0.5], [1]),
        (2, [0.5 - 1 / (2 * 3**0.5), 0.5 + 1 / (2 * 3**0.5)], [0.5, 0.5]),
        (3, [0.5 - 15**0.5 / 10, 0.5, 0.5 + 15**0.5 / 10], [5 / 18, 4 / 9, 5 / 18]),
    ):
        node_N, weight_N = gauss_legendre(N)
        assert node_N.tolist() == pytest.approx(t, abs=1e-6) and weight_N.tolist() == pytest.approx(w, abs=1e-6)


@LENGTHS
def test_coupled(toy, n, monkeypatch):
    cases = [([[t_01], [u]], weight * p) for t_01, weight in nodes() for u, p in mask_cases(0.2 + 0.6 * t_01)]
    mean_C, _, _ = mean_of(toy, "coupled", n, cases, monkeypatch, draws=1)
    for i in range(C):
        expected = 0.0
        if i < n:
            expected = single(toy, n, set())[i] / 2
            others = [j for j in range(n) if j != i]
            for t, weight in nodes(0.2, 0.8):
                for flags in itertools.product([True, False], repeat=len(others)):
                    hidden = {j for j, flag in zip(others, flags, strict=True) if flag}
                    p = math.prod(t if flag else 1 - t for flag in flags)
                    # In S with the others of S hidden, or in the complement with those of S shown: each weighs 1/2.
                    expected += weight * p * single(toy, n, set(others) - hidden)[i] / 2
                    expected += weight * p * single(toy, n, hidden)[i] / 2
        assert mean_C[i].item() == pytest.approx(expected, abs=1e-5)


@LENGTHS
@pytest.mark.parametrize("K", [1, 2])
def test_sequence_elbo(toy, n, K, monkeypatch):
    # The second pair of canvases is drawn like the first: a mean over both needs no independence.
    cases = [([[(k + 0.5) / (n + 1)] * K, [u] * K], p / (n + 1)) for k in range(n + 1) for u, p in order_cases()]
    mean_C, _, _ = mean_of(toy, "sequence_elbo", n, cases, monkeypatch, draws=K)
    assert mean_C.sum().item() == pytest.approx(elbo_of(toy, n, range(n)), abs=1e-5)


def bound_cases(n, block):
    """Which block, how many of its tokens, which of them. Twelve divides into every number of them."""
    blocks = -(-n // (block or C))
    return [
        ([[(b + 0.5) / blocks], [(k + 0.5) / 12], [u]], p / blocks / 12)
        for b in range(blocks)
        for k in range(12)
        for u, p in order_cases()
    ]


@LENGTHS
@pytest.mark.parametrize("block", [0, 2, 3])
def test_lower_bound_of_blocks(toy, n, block, monkeypatch):
    mean_C, _, _ = mean_of(
        toy, "block_bounds", n, bound_cases(n, block), monkeypatch, draws=1, block_length=block, advantage=2.0
    )
    starts = range(0, n, block or C)
    expected = [elbo_of(toy, n, range(s, min(n, s + (block or C))), range(s)) for s in starts]
    assert mean_C.sum().item() == pytest.approx(sum(expected), abs=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_upper_bound_of_blocks(toy, share, monkeypatch):
    # All the noise as one estimate with that many canvases, which is what the bound is about.
    n, power = 4, 1.5
    mean_C, noise, probability_B = mean_of(
        toy, "block_bounds", n, bound_cases(n, 2), monkeypatch, draws=1, block_length=2
    )
    everything = NoiseDraw(
        noise.hidden_KBL[0][:, None],
        (noise.weight_KBC[0] * probability_B[:, None]).float()[:, None],
        noise.count_BC[:1],
    )
    config = ObjectiveConfig(upper_power=power, upper_share=share)
    bounds_C = partial(estimate, "block_bounds", toy, copies(n), everything, config)
    lower_C, upper_C = bounds_C(torch.tensor([0.1]))[0].detach(), bounds_C(torch.tensor([0.0]))[0].detach()
    torch.testing.assert_close(lower_C, mean_C, rtol=0, atol=1e-5)
    for i in range(n):
        block = i // 2 * 2
        other = block + 1 - i % 2
        # Both hidden, or this one alone: each half the time, with weights 1 and 2, for the one block evaluated.
        ps = [math.exp(single(toy, n, shown)[i]) for shown in (set(range(block)), {*range(block), other})]
        bound = math.log(sum(p**power for p in ps) / 2) / power
        assert upper_C[i].item() == pytest.approx(share * bound + (1 - share) * lower_C[i].item(), abs=1e-5)
        assert bound > lower_C[i]


def test_a_token_that_no_canvas_hides_has_no_bound(toy):
    noise = NoiseDraw(torch.zeros(1, 1, PROMPT + C, dtype=torch.bool), torch.zeros(1, 1, C), torch.ones(1, C).bool())
    noise.weight_KBC[0, 0, 1] = 2.0
    for A in (1.0, -1.0):
        l_BC = estimate("block_bounds", toy, copies(4), noise, ObjectiveConfig(), torch.tensor([A]))
        assert (l_BC[0, [0, 2, 3]] == 0).all() and l_BC[0, 1] < 0
        (g,) = torch.autograd.grad(l_BC.sum(), toy.out_HV)
        assert g.isfinite().all() and g.abs().max() > 0


# ------------------------------------------------------------------------------------------------ trajectories
def trajectory_of(toy, n, step_C, group):
    """Summed log-probabilities of the tokens that fix the final text, each on the canvas before its group of steps."""
    last = max(step_C[:n])
    total = 0.0
    for i in range(C):
        if step_C[i] <= last:
            shown = {j for j in range(C) if step_C[j] // group < step_C[i] // group}
            total += single(toy, n, shown)[i]
    return total


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize(("n", "step_C"), [(4, (2, 0, 3, 1)), (3, (1, 0, 3, 2)), (1, (1, 0, 9, 9)), (4, (0, 1, 1, 2))])
def test_trajectory_sampled(toy, n, step_C, group, monkeypatch):
    expected = trajectory_of(toy, n, step_C, group)
    for K in (1, 2, 3, 5):
        cases = [([[(j + 0.5) / 120]], 1 / 120) for j in range(120)]
        mean_C, _, _ = mean_of(
            toy, "trajectory_sampled", n, cases, monkeypatch, step_C, draws=K, trajectory_steps=group
        )
        assert mean_C.sum().item() == pytest.approx(expected, abs=1e-5)
    config, rollout = ObjectiveConfig(trajectory_steps=group), copies(n, 1, step_C)
    noise = ESTIMATORS["trajectory"].draw(rollout, config, [None])
    l_BC = estimate("trajectory", toy, rollout, noise, config, torch.ones(1))
    assert l_BC.sum().item() == pytest.approx(expected, abs=1e-5)
    assert noise.count_BC[0].tolist() == [s <= max(step_C[:n]) for s in step_C]


def trajectory_logp(policy, rollout, config):
    """The estimate of the whole trajectory, under the sampler's own distribution."""
    estimator, o, B = ESTIMATORS["trajectory"], ObjectiveConfig(), len(rollout.canvas_BL)
    noise = estimator.draw(rollout, o, [None] * B)
    values = sampled_values(policy, config)
    return estimator.estimate(values, rollout, noise, policy.mask_id, o, torch.ones(B))["logp"]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 0.8), (0.9, 2, 1.0), (1.3, 3, 0.9)]
)
@pytest.mark.parametrize("rule", ["entropy", "maskgit_plus", "topk_margin", "origin"])
def test_trajectory_reproduces_what_the_sampler_recorded(rule, temperature, top_k, top_p, guided):
    toy = Toy(PROMPT + C)
    sampler = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    config = RolloutConfig(max_completion_length=C, steps=3, confidence=rule, **sampler)
    guide = random_guide(V, GuidanceConfig(kind="entrgi", steps=2), dtype=torch.float64) if guided else None
    rollout = roll_out(toy, config, torch.tensor([[0, 1], [1, 1]] * 6), guide=guide)
    decided_BC, finite_BC = rollout.decided_BC, rollout.policy_logp_BC.isfinite()
    assert (rollout.completion_mask_BC & ~decided_BC).sum() == 0 and (decided_BC & ~rollout.completion_mask_BC).any()
    assert guided or finite_BC.all()
    l_BC = trajectory_logp(toy, rollout, config)
    inside_BC = decided_BC & finite_BC
    torch.testing.assert_close(l_BC[inside_BC].float(), rollout.policy_logp_BC[inside_BC], rtol=0, atol=1e-6)
    assert (l_BC[~decided_BC] == 0).all()
    assert l_BC[decided_BC].isfinite().all()  # also where the policy alone would never have gone


@pytest.mark.parametrize("block", [0, 4])
def test_trajectory_of_a_real_model(policy, block):
    sampler = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "block_length": block}
    config = RolloutConfig(max_completion_length=8, steps=5, block_cache=False, **sampler)
    rollout = generate(policy, PROMPTS[:4], config)
    with torch.no_grad():
        l_BC = trajectory_logp(policy, rollout, config)
    decided_BC = rollout.decided_BC
    torch.testing.assert_close(l_BC[decided_BC], rollout.policy_logp_BC[decided_BC], rtol=0, atol=1e-5)


def test_the_trajectory_of_cached_blocks_is_an_approximation(policy):
    config = RolloutConfig(max_completion_length=8, steps=8, temperature=0.7, block_length=4)
    rollout = generate(policy, PROMPTS[:4], config)
    with torch.no_grad():
        l_BC = trajectory_logp(policy, rollout, config)
    apart_BC = torch.where(rollout.decided_BC, (l_BC - rollout.policy_logp_BC).abs(), 0.0)
    whole_BC = rollout.unmask_step_BC % 4 == 0  # a step that begins a block reads the whole canvas
    assert (apart_BC[whole_BC] < 1e-5).all() and apart_BC.max() > 1e-4


def test_sampled_logp_has_the_gradient_of_its_value():
    rng = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(5, 7, generator=rng).double().requires_grad_()
    token_N = torch.tensor([0, 1, 2, 3, 6])
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.7), (4, 0.8)):
        assert torch.autograd.gradcheck(lambda x, k=top_k, p=top_p: sampled_logp(x, token_N, 0.8, k, p), logits_NV)
