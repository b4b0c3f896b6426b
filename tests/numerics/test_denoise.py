"""The unmasking loop against a slow version of it: loops over steps, rows and positions, plain Python numbers."""

import math

import pytest
import torch
from checkpoints import PROMPTS
from toys import noise_for, random_guide, roll_out, steered

from rgrl.config import GuidanceConfig, RolloutConfig
from rgrl.rewards import load_classifier
from rgrl.rollout.denoise import DenoiseStats, denoise
from rgrl.rollout.guidance import Hidden
from rgrl.rollout.schedule import commit_schedule
from rgrl.types import Prompts

V, MASK, END, C = 12, 11, 7, 6
PROMPT_BL = torch.tensor([[0, 0, 3, 1], [4, 5, 6, 8], [0, 2, 2, 9]])
ATTENTION_BL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()


class Toy:
    """A policy whose logits at a position depend on every token of its row: order of commitment matters."""

    mask_id = MASK

    def __init__(self, seed=0, scale=0.5, end_bias=0.0):
        rng = torch.Generator().manual_seed(seed)
        self.token_VH = torch.randn(V, 8, generator=rng)
        self.place_LH = torch.randn(32, 8, generator=rng)
        self.out_HV = scale * torch.randn(8, V, generator=rng)
        self.end_bias = end_bias
        self.rows = []  # of each forward pass

    def is_end(self, ids):
        return ids == END

    def logits(self, canvas_BL, attention_BL, at_N, prefix=None):
        self.rows.append(len(canvas_BL))
        L = canvas_BL.shape[1]
        states_BLH = self.token_VH[canvas_BL] * self.place_LH[:L].flip(0) * attention_BL[..., None]
        mixed_BLH = torch.tanh(states_BLH.sum(1, keepdim=True) + self.place_LH[:L].flip(0))
        logits_BLV = mixed_BLH @ self.out_HV
        logits_BLV[..., END] += self.end_bias
        logits_BLV[..., MASK] = float("-inf")
        return logits_BLV.flatten(0, 1)[at_N]


class FixedEnds(Toy):
    """Positions 1, 2 and 4 of the completion are end-of-text for certain; the others are unsure between two words."""

    def logits(self, canvas_BL, attention_BL, at_N, prefix=None):
        self.rows.append(len(canvas_BL))
        logits_BLV = torch.full((*canvas_BL.shape, V), float("-inf"))
        logits_BLV[..., [2, 3]] = torch.tensor([0.0, 0.3])
        ends = [4 + c for c in (1, 2, 4)]
        logits_BLV[:, ends] = float("-inf")
        logits_BLV[:, ends, END] = 0.0
        return logits_BLV.flatten(0, 1)[at_N]


def settings(steps=C, **more):
    return RolloutConfig(max_completion_length=C, steps=steps, **more)


def toy_guide(kind="expectation", steps=2, eta=0.7):
    return random_guide(V, GuidanceConfig(kind, steps, eta))


def run(policy, config, seed=0, guide=None, stats=None, prompts=(PROMPT_BL, ATTENTION_BL)):
    return roll_out(policy, config, *prompts, guide, seed, stats)


def log_distribution(logits_V, config):
    """Tempered and truncated by a full sort, as a list of log-probabilities (-inf outside the support)."""
    scaled = [x / config.temperature for x in logits_V.tolist()]
    order = sorted(range(len(scaled)), key=scaled.__getitem__, reverse=True)[: config.top_k or len(scaled)]
    weight = {v: math.exp(scaled[v] - scaled[order[0]]) for v in order}
    kept, mass, total = [], 0.0, sum(weight.values())
    for v in order:
        if mass >= config.top_p * total:
            break
        kept.append(v)
        mass += weight[v]
    logp = [-math.inf] * len(scaled)
    for v in kept:
        logp[v] = math.log(weight[v] / mass) if weight[v] > 0 else -math.inf
    return logp


def quantile(logp, u, config):
    """The token at quantile u: counted from the most likely one on where top-k sorts them, else by token id."""
    tokens = range(len(logp))
    if 0 < config.top_k < len(logp):
        tokens = sorted(tokens, key=logp.__getitem__, reverse=True)
    total = 0.0
    for v in tokens:
        total += math.exp(logp[v])
        if total > u:
            return v
    raise AssertionError(f"{u} is beyond {total}")


def slow_confidence(rule, logp, token, u):
    p = [math.exp(x) for x in logp]
    if rule == "origin":
        return u
    if rule == "maskgit_plus":
        return p[token]
    if rule == "topk_margin":
        best, second = sorted(p, reverse=True)[:2]
        return best - second
    return sum(x * math.log(x) for x in p if x > 0)


class TieError(Exception):
    """Two positions are equally sure and only one is to be committed: the method doesn't say which."""


def slow_denoise(policy, config, seed, guide, prompts):
    """Section 1 of the method, with the same random numbers as the loop under test."""
    (prompt_BL, attention_BL), mask_id, is_end = prompts, policy.mask_id, policy.is_end
    B, width = prompt_BL.shape
    T, noise = config.steps, noise_for(config, B, guide, seed)
    canvas = [row + [mask_id] * C for row in prompt_BL.tolist()]
    attention = torch.cat([attention_BL, torch.ones(B, C, dtype=torch.bool)], 1)
    step, behaviour, own = ([[None] * C for _ in range(B)] for _ in range(3))
    for t in range(T):
        # C (T - t - 1) / T tokens should be hidden after step t, rounded up.
        hidden_after = -(-C * (T - t - 1) // T)
        hidden = [[c for c in range(C) if canvas[b][width + c] == mask_id] for b in range(B)]
        k = len(hidden[0]) - hidden_after
        assert k > 0
        ids = torch.tensor(canvas)
        policy_NV = guided_NV = policy.logits(ids, attention, (ids == mask_id).flatten().nonzero()[:, 0])
        if guide is not None:  # test_guidance.py compares this part with a slow version of its own
            hidden_N = (ids[:, width:] == mask_id).flatten().nonzero()[:, 0]
            u_MN = torch.stack([u_BC.flatten()[hidden_N] for u_BC in noise.hard_BTMC[:, t].unbind(1)])
            guided_NV, _ = steered(
                policy_NV, Hidden(ids[:, width:], hidden_N, torch.arange(B)), guide, config, is_end, u_MN
            )
        n = 0
        for b in range(B):
            ranked = []
            for c in hidden[b]:
                own_logp = log_distribution(policy_NV[n], config)
                logp = log_distribution(guided_NV[n], config)
                token = quantile(logp, noise.token_BTC[b, t, c].item(), config)
                u = noise.order_BTC[b, t, c].item()
                read = logp if config.confidence_from == "guided" else own_logp
                sure = slow_confidence(config.confidence, read, token, u)
                sure -= config.position_temperature * math.log(-math.log(u))
                if config.defer_eos and is_end(torch.tensor(token)):
                    sure = -math.inf
                ranked.append((sure, c, token, logp[token], own_logp[token]))
                n += 1
            ranked.sort(key=lambda item: -item[0])
            if k < len(ranked) and math.isclose(ranked[k - 1][0], ranked[k][0], abs_tol=1e-6):
                raise TieError
            for _, c, token, logp, own_logp in ranked[:k]:
                canvas[b][width + c] = token
                step[b][c], behaviour[b][c], own[b][c] = t, logp, own_logp
    return canvas, step, behaviour, own


RULES = ["entropy", "maskgit_plus", "topk_margin", "origin"]


def assert_same(policy, config, guide=None, slow_policy=None, prompts=(PROMPT_BL, ATTENTION_BL)):
    """The loop under test and the slow one agree, for the first four seeds without a tie."""
    compared = 0
    for seed in range(30):
        try:
            canvas, step, behaviour, own = slow_denoise(slow_policy or policy, config, seed, guide, prompts)
        except TieError:
            continue
        rollout = run(policy, config, seed, guide, prompts=prompts)
        counted_BC = rollout.completion_mask_BC
        ended_BC = policy.is_end(torch.tensor(canvas)[:, -C:]).long()
        assert torch.equal(counted_BC, ended_BC.cumsum(1) == ended_BC)
        # Tokens after the end don't count; a row with nothing else left is not written any more.
        for made, expected, tolerance in (
            (rollout.completion_BC, [row[-C:] for row in canvas], 0),
            (rollout.unmask_step_BC, step, 0),
            (rollout.behaviour_logp_BC, behaviour, 1e-5),
            (rollout.policy_logp_BC, own, 1e-5),
        ):
            torch.testing.assert_close(made[counted_BC], torch.tensor(expected)[counted_BC], rtol=0, atol=tolerance)
        compared += 1
        if compared == 4:
            return
    raise AssertionError(f"only {compared} seeds without a tie")


@pytest.mark.parametrize("position_temperature", [0.0, 0.6])
@pytest.mark.parametrize("source", ["policy", "guided"])
@pytest.mark.parametrize("rule", RULES)
def test_guided_denoising_equals_the_slow_loop(rule, source, position_temperature):
    order = {"confidence": rule, "confidence_from": source, "position_temperature": position_temperature}
    assert_same(Toy(), settings(4, temperature=0.8, top_p=0.9, top_k=7, **order), toy_guide("entrgi"))


@pytest.fixture(scope="module")
def reward(reward_dir):
    loaded = load_classifier(reward_dir)
    # Adam's step is g / (|g| + 1e-8): of a gradient far above that it keeps the sign, which near 0 is
    # left to rounding. A reward this small keeps gradients at about 1e-8, where the step is smooth in them.
    loaded.model.score.weight.data *= 3e-8
    return loaded.bind(loaded.tokenizer, 4096)


class RowByRow:
    """A policy that sees one row at a time, without its padding, and projects the whole canvas."""

    def __init__(self, policy):
        self.policy, self.mask_id, self.is_end = policy, policy.mask_id, policy.is_end

    @torch.no_grad()
    def logits(self, canvas_BL, attention_BL, at_N):
        full_BLV = torch.zeros(*canvas_BL.shape, self.policy.vocab_size)
        for b, real_L in enumerate(attention_BL):
            ids = canvas_BL[b, real_L][None]
            full_BLV[b, real_L] = self.policy.logits(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        return full_BLV.flatten(0, 1)[at_N]


@pytest.mark.parametrize("kind", ["none", "expectation", "aps", "entrgi"])
@pytest.mark.parametrize("padded", [False, True])
def test_denoising_with_real_models_equals_the_slow_loop(policy, padded, kind, reward):
    texts = PROMPTS[:3] if padded else [PROMPTS[0]] * 3
    prompts = policy.encode([policy.format_prompt(text) for text in texts])
    assert bool(prompts[1].all()) != padded
    guide = None
    if kind != "none":
        guide = reward.guidance(GuidanceConfig(kind=kind, steps=2)).guide(Prompts(texts, [{}] * 3))
    assert_same(policy, settings(3), guide, RowByRow(policy), prompts)
    if guide is not None:  # and it is not that nothing was steered
        rollout = run(policy, settings(3), guide=guide, prompts=prompts)
        assert (rollout.behaviour_logp_BC - rollout.policy_logp_BC).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [2, 4, 6])
@pytest.mark.parametrize("defer_eos", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_unguided_denoising_equals_the_slow_loop(rule, defer_eos, steps):
    # End-of-text is likely, so that deferring it changes the order; no truncation here.
    config = settings(steps, temperature=1.3, top_p=1.0, top_k=0, confidence=rule, defer_eos=defer_eos)
    assert_same(Toy(end_bias=1.0), config)


def test_the_source_of_confidence_changes_the_order():
    # Otherwise the comparison of both sources above would say nothing.
    orders = []
    for source in ("policy", "guided"):
        rollouts = [run(Toy(), settings(confidence_from=source), seed, toy_guide()) for seed in range(5)]
        orders.append(torch.stack([r.unmask_step_BC for r in rollouts]))
    assert not torch.equal(*orders)


@pytest.mark.parametrize(("length", "steps"), [(8, 8), (8, 4), (8, 3), (7, 5), (128, 128), (128, 48), (5, 1)])
def test_schedule_falls_linearly_and_sums_to_the_length(length, steps):
    schedule = commit_schedule(length, steps)
    assert len(schedule) == steps and sum(schedule) == length
    hidden = length
    for t, k in enumerate(schedule, 1):
        hidden -= k
        assert 0 <= hidden - length * (1 - t / steps) < 1  # the line, to within one token
    assert max(schedule) - min(schedule) <= 1


def test_steps_that_would_commit_nothing_cost_no_forward_pass():
    policy = Toy()
    rollout = run(policy, settings(C + 5))
    assert len(policy.rows) == C
    assert not (rollout.completion_BC == MASK).any()


def test_the_first_canvas_of_a_group_takes_one_forward_pass():
    policy, config = Toy(), settings()
    prompt_BL, attention_BL = (x[[1, 0, 1, 0]] for x in (PROMPT_BL, ATTENTION_BL))
    noise = noise_for(config, 4)
    together = denoise(policy, prompt_BL, attention_BL, config, noise)
    assert policy.rows[:2] == [2, 4]
    for b in range(4):
        alone = denoise(Toy(), prompt_BL[b : b + 1], attention_BL[b : b + 1], config, noise.rows(torch.tensor([b])))
        for name, value in vars(alone).items():
            torch.testing.assert_close(vars(together)[name][b : b + 1], value)


def test_rows_leave_once_nothing_before_their_end_is_hidden():
    # Positions 1, 2 and 4 end the text for certain; in random order some row has 0 and 1 before the others.
    for seed in range(3):
        policy = FixedEnds()
        rollout = run(policy, settings(confidence="origin"), seed)
        open_BC = rollout.unmask_step_BC == C  # never committed
        assert open_BC.any() and not (open_BC & rollout.completion_mask_BC).any()
        assert (rollout.completion_BC[open_BC] == END).all()
        last_B = torch.where(open_BC, -1, rollout.unmask_step_BC).amax(1)
        assert policy.rows == [int((last_B >= t).sum()) for t in range(int(last_B.max()) + 1)]


@pytest.mark.parametrize("guide", [None, toy_guide("entrgi")], ids=["unguided", "guided"])
def test_committing_above_a_threshold_takes_fewer_steps_and_leaves_no_hole(guide):
    slow, fast = Toy(scale=2.0), Toy(scale=2.0)
    run(slow, settings(), guide=guide)
    rollout = run(fast, settings(commit_above=0.5), guide=guide)
    assert len(fast.rows) < len(slow.rows)
    assert not (rollout.completion_BC == MASK).any()
    counted_BC = rollout.completion_mask_BC
    assert rollout.behaviour_logp_BC[counted_BC].isfinite().all() and (rollout.unmask_step_BC[counted_BC] < C).all()
    # Nothing is that sure: the same as without.
    for name, value in vars(run(Toy(), settings(commit_above=0.9999), guide=guide)).items():
        assert torch.equal(value, vars(run(Toy(), settings(), guide=guide))[name])


def test_without_guidance_both_logps_are_the_same():
    for guide in (None, toy_guide("none")):
        rollout = run(Toy(), settings(4), guide=guide)
        assert torch.equal(rollout.behaviour_logp_BC, rollout.policy_logp_BC)
        assert (rollout.policy_logp_BC < 0).any()
    guided = run(Toy(), settings(4), guide=toy_guide())
    assert not torch.allclose(guided.behaviour_logp_BC, guided.policy_logp_BC)


def test_a_token_outside_the_policys_own_support_has_logp_minus_infinity():
    rollout = run(Toy(), settings(3, top_k=2, top_p=1.0), guide=toy_guide(steps=5, eta=2.0))
    assert torch.isneginf(rollout.policy_logp_BC).any()
    assert torch.isfinite(rollout.behaviour_logp_BC).all()  # what was sampled was possible


@pytest.mark.parametrize("guided", [False, True])
def test_recorded_logps_are_those_of_the_canvas_before_each_step(guided, policy):
    config = RolloutConfig(max_completion_length=8, steps=5, temperature=0.7, top_k=20, top_p=0.9)
    prompt_BL, attention_BL = policy.encode([policy.format_prompt(text) for text in PROMPTS[:3]])
    guide = random_guide(policy.vocab_size, GuidanceConfig(kind="expectation")) if guided else None
    rollout = run(policy, config, guide=guide, prompts=(prompt_BL, attention_BL))
    width = prompt_BL.shape[1]
    for b in range(3):
        ids = rollout.canvas_BL[b]
        for t in range(5):
            before = ids.clone()
            hidden = rollout.unmask_step_BC[b] >= t
            before[width:][hidden] = policy.mask_id
            logits_LV = policy.logits(before[None], rollout.attention_BL[b : b + 1])[0].detach()
            for c in (rollout.unmask_step_BC[b] == t).nonzero()[:, 0].tolist():
                expected = log_distribution(logits_LV[width + c], config)[ids[width + c]]
                assert rollout.policy_logp_BC[b, c].item() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(rollout.canvas_BL[:, :width], prompt_BL)
    assert torch.equal(rollout.attention_BL[:, :width], attention_BL)
    if not guided:
        assert torch.equal(rollout.behaviour_logp_BC, rollout.policy_logp_BC)


@pytest.mark.parametrize("rule", RULES)
def test_deferred_end_of_text_is_committed_last(rule):
    step_BC = run(FixedEnds(), settings(confidence=rule, defer_eos=True)).unmask_step_BC
    assert (step_BC[:, [1, 2, 4]] >= 3).all() and (step_BC[:, [0, 3, 5]] < 3).all()


def test_sure_end_of_text_is_committed_first_and_ends_the_completion_mask():
    rollout = run(FixedEnds(), settings())
    assert (rollout.unmask_step_BC[:, [1, 2, 4]] < 3).all()
    assert rollout.completion_mask_BC.tolist() == [[True, True, False, False, False, False]] * 3
    assert run(Toy(end_bias=-100.0), settings()).completion_mask_BC.all()


def test_same_seed_same_rollout_and_no_mask_token_remains():
    config = settings(3, confidence="origin", position_temperature=0.5)
    torch.manual_seed(1)
    one = run(Toy(), config, seed=5, guide=toy_guide("aps"))
    torch.manual_seed(2)  # the global generator changes nothing
    two = run(Toy(), config, seed=5, guide=toy_guide("aps"))
    other = run(Toy(), config, seed=6, guide=toy_guide("aps"))
    for name, value in vars(one).items():
        assert torch.equal(value, vars(two)[name]), name
    assert not torch.equal(one.canvas_BL, other.canvas_BL)
    for rollout in (one, other):
        assert not (rollout.completion_BC == MASK).any()


def test_rollout_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    run(Toy(), settings(3), guide=toy_guide("aps"))
    assert torch.equal(torch.get_rng_state(), before)


def test_stats_count_committed_tokens_their_entropy_and_those_whose_best_guess_moved():
    def stats_of(guide):
        stats = DenoiseStats()
        run(Toy(), settings(2), 0, guide, stats)
        return stats

    def changed(stats):
        return float(torch.stack(stats.changed).sum() / torch.stack(stats.guided).sum())

    unguided, weak, strong = map(
        stats_of, (toy_guide("none"), toy_guide(steps=1, eta=1e-6), toy_guide(steps=9, eta=3.0))
    )
    assert unguided.changed == []
    assert changed(weak) == 0
    assert 0 < changed(strong) <= 1
    assert int(torch.stack(strong.committed).sum()) == 3 * C
    # The policy's own entropy, which no guidance changes where the tokens before are the same: in the first step.
    assert strong.entropy[0] == unguided.entropy[0] and 0 < strong.entropy[0] < 3 * C * math.log(V)
    weight = stats_of(toy_guide("entrgi")).weight
    assert {q: [n for _, n in pairs] for q, pairs in weight.items()} == {1: [3 * C], 2: [], 3: [3 * C // 2], 4: []}
    assert all(0 < w / n < 1 for pairs in weight.values() for w, n in pairs)
    assert not any(strong.weight.values())  # no other guidance has one
