"""The unmasking loop against a slow version of it: loops over steps, rows and positions, plain Python numbers."""

import dataclasses
import math

import pytest
import torch
from conftest import PROMPTS, write_reward

from rgrl.config import GuidanceConfig, ModelConfig, RolloutConfig
from rgrl.denoise import DenoiseStats, RolloutNoise, commit_schedule, denoise
from rgrl.guidance import Guide, guide
from rgrl.models import load_policy
from rgrl.rewards import load_classifier
from rgrl.sampling import support_of
from rgrl.seeds import generators
from rgrl.types import Prompts

V, MASK, END, C = 12, 11, 7, 6


def is_end(ids):
    return ids == END


class Toy:
    """A policy whose logits at a position depend on every token of its row: order of commitment matters."""

    def __init__(self, seed=0, scale=0.5, end_bias=0.0):
        rng = torch.Generator().manual_seed(seed)
        self.token_VH = torch.randn(V, 8, generator=rng)
        self.place_LH = torch.randn(32, 8, generator=rng)
        self.out_HV = scale * torch.randn(8, V, generator=rng)
        self.end_bias = end_bias
        self.calls, self.rows = 0, []

    def __call__(self, canvas_BL, attention_BL, at_N):
        self.calls += 1
        self.rows.append(len(canvas_BL))
        L = canvas_BL.shape[1]
        states_BLH = self.token_VH[canvas_BL] * self.place_LH[:L].flip(0) * attention_BL[..., None]
        mixed_BLH = torch.tanh(states_BLH.sum(1, keepdim=True) + self.place_LH[:L].flip(0))
        logits_BLV = mixed_BLH @ self.out_HV
        logits_BLV[..., END] += self.end_bias
        logits_BLV[..., MASK] = float("-inf")
        return logits_BLV.flatten(0, 1)[at_N]


def prompts():
    prompt_BL = torch.tensor([[0, 0, 3, 1], [4, 5, 6, 8], [0, 2, 2, 9]])
    attention_BL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    return prompt_BL, attention_BL


def toy_guide(kind="expectation"):
    rng = torch.Generator().manual_seed(4)
    embedding_VD, direction_D = torch.randn(V, 5, generator=rng), torch.randn(5, generator=rng)

    def reward(response_BCD, attention_BC, rows_B):
        return torch.tanh((response_BCD * attention_BC[..., None]) @ direction_D).sum(1)

    return Guide(reward, embedding_VD, GuidanceConfig(kind=kind, steps=2, eta=0.7))


@dataclasses.dataclass
class Case:
    """Three prompts and what a token id means."""

    prompt_BL: torch.Tensor
    attention_BL: torch.Tensor
    mask: int = MASK
    is_end: object = is_end


def run(policy, config, seed=0, guidance=None, stats=None, case=None):
    case, noise = case or Case(*prompts()), noise_for(config, seed, guidance)
    return denoise(policy, case.prompt_BL, case.attention_BL, case.mask, case.is_end, config, noise, guidance, stats)


def noise_for(config, seed, guidance=None, rows=3):
    M = guidance.config.steps if guidance is not None else 0
    return RolloutNoise.draw(generators(seed, 0, range(rows), "test"), config.steps, config.max_completion_length, M)


def log_distribution(logits_V, config):
    """Tempered and truncated by a full sort, as a list of log-probabilities (-inf outside the support)."""
    scaled = [x / config.temperature for x in logits_V.tolist()]
    order = sorted(range(len(scaled)), key=lambda v: -scaled[v])[: config.top_k or len(scaled)]
    weight = {v: math.exp(scaled[v] - scaled[order[0]]) for v in order}
    kept, mass, total = [], 0.0, sum(weight.values())
    for v in order:
        if mass >= config.top_p * total:
            break
        kept.append(v)
        mass += weight[v]
    return [math.log(weight[v] / mass) if v in kept and weight[v] > 0 else -math.inf for v in range(len(scaled))]


def quantile(logp, u, config):
    """The token at quantile u: counted from the most likely one on where top-k sorts them, else by token id."""
    tokens = range(len(logp))
    if 0 < config.top_k < len(logp):
        tokens = sorted(tokens, key=lambda v: -logp[v])
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


def slow_denoise(policy, config, seed, guidance=None, case=None):
    """Section 1 of the method, with the same random numbers as the loop under test."""
    case, noise = case or Case(*prompts()), noise_for(config, seed, guidance)
    prompt_BL, attention_BL, MASK, is_end = case.prompt_BL, case.attention_BL, case.mask, case.is_end
    B, width = prompt_BL.shape
    T = config.steps
    canvas = [row + [MASK] * C for row in prompt_BL.tolist()]
    attention = torch.cat([attention_BL, torch.ones(B, C, dtype=torch.bool)], 1)
    step, behaviour, own = ([[None] * C for _ in range(B)] for _ in range(3))
    for t in range(T):
        # C (T - t - 1) / T tokens should be hidden after step t, rounded up.
        hidden_after = -(-C * (T - t - 1) // T)
        hidden = [[c for c in range(C) if canvas[b][width + c] == MASK] for b in range(B)]
        k = len(hidden[0]) - hidden_after
        assert k > 0
        ids = torch.tensor(canvas)
        at = ids == MASK
        policy_NV = policy(ids, attention, at.flatten().nonzero()[:, 0])
        guided_NV = policy_NV.clone()
        if guidance is not None:  # test_guidance.py compares this part with a slow version of its own
            completion = ids[:, width:]
            hidden_N = (completion == MASK).flatten().nonzero()[:, 0]
            support = support_of(policy_NV, config.temperature, config.top_k, config.top_p)
            u_MN = torch.stack([u_BC.flatten()[hidden_N] for u_BC in noise.hard_BTMC[:, t].unbind(1)])
            guide(guided_NV, support, completion, hidden_N, torch.arange(B), guidance, config, is_end, u_MN)
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


def assert_same(policy, config, guidance=None, slow_policy=None, case=None):
    """The loop under test and the slow one agree, for the first four seeds without a tie."""
    end = case.is_end if case is not None else is_end
    compared = 0
    for seed in range(30):
        try:
            canvas, step, behaviour, own = slow_denoise(slow_policy or policy, config, seed, guidance, case)
        except TieError:
            continue
        rollout = run(policy, config, seed, guidance, case=case)
        counted_BC = rollout.completion_mask_BC
        ended_BC = end(torch.tensor(canvas)[:, -C:]).long()
        assert torch.equal(counted_BC, ended_BC.cumsum(1) == ended_BC)
        # What comes after the end token doesn't count; a row that has only such positions left is not written on.
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
    config = RolloutConfig(
        max_completion_length=C,
        steps=4,
        temperature=0.8,
        top_p=0.9,
        top_k=7,
        confidence=rule,
        confidence_from=source,
        position_temperature=position_temperature,
    )
    assert_same(Toy(), config, toy_guide("entrgi"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    loaded = load_classifier(str(write_reward(tmp_path_factory.mktemp("reward"))), "cpu")
    # Adam's step is g / (|g| + 1e-8): of a gradient far above that it keeps the sign, which near 0 is
    # left to rounding. A reward this small keeps gradients at about 1e-8, where the step is smooth in them.
    loaded.model.score.weight.data *= 3e-8
    loaded.bind(loaded.tokenizer, 4096, "compose")
    return loaded


@pytest.mark.parametrize("kind", ["none", "expectation", "aps", "entrgi"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_denoising_with_real_models_equals_the_slow_loop(family, padded, kind, reward, request):
    policy = load_policy(ModelConfig(path=str(request.getfixturevalue(f"{family}_dir"))))
    texts = PROMPTS[:3] if padded else [PROMPTS[0]] * 3
    prompt_BL, attention_BL = policy.encode_prompts(texts, 16)
    assert bool(attention_BL.all()) != padded

    @torch.no_grad()
    def slow_policy(canvas_BL, attention_BL, at_N):
        """One row at a time and without its padding, the whole canvas projected."""
        full_BLV = torch.zeros(*canvas_BL.shape, policy.vocab_size)
        for b, real_L in enumerate(attention_BL):
            ids = canvas_BL[b, real_L][None]
            full_BLV[b, real_L] = policy.logits(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        return full_BLV.flatten(0, 1)[at_N]

    guidance = None
    if kind != "none":
        session = reward.guide_for(Prompts(texts, [{}] * 3))
        guidance = Guide(session, reward.embedding_VD, GuidanceConfig(kind=kind, steps=2))
    case = Case(prompt_BL, attention_BL, policy.mask_id, policy.is_end)
    config = RolloutConfig(max_completion_length=C, steps=3)
    assert_same(policy.logits, config, guidance, slow_policy, case)
    if guidance is not None:  # and it is not that nothing was steered
        rollout = run(policy.logits, config, guidance=guidance, case=case)
        assert (rollout.behaviour_logp_BC - rollout.policy_logp_BC).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [2, 4, 6])
@pytest.mark.parametrize("defer_eos", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_unguided_denoising_equals_the_slow_loop(rule, defer_eos, steps):
    # End-of-text is likely, so that deferring it changes the order; no truncation in this one.
    config = RolloutConfig(
        max_completion_length=C, steps=steps, temperature=1.3, top_p=1.0, top_k=0, confidence=rule, defer_eos=defer_eos
    )
    assert_same(Toy(end_bias=1.0), config)


def test_what_the_confidence_reads_changes_the_order():
    # Otherwise the comparison of both sources above would say nothing.
    orders = []
    for source in ("policy", "guided"):
        config = RolloutConfig(max_completion_length=C, steps=C, confidence_from=source)
        rollouts = [run(Toy(), config, seed, toy_guide()) for seed in range(5)]
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
    config = RolloutConfig(max_completion_length=C, steps=C + 5)
    rollout = run(policy, config)
    assert policy.calls == C
    assert not (rollout.completion_BC == MASK).any()


def test_the_first_canvas_of_a_group_is_read_once():
    policy, config = Toy(), RolloutConfig(max_completion_length=C, steps=C)
    prompt_BL, attention_BL = (x[torch.tensor([1, 0, 1, 0])] for x in prompts())
    noise = noise_for(config, 0, rows=4)
    together = denoise(policy, prompt_BL, attention_BL, MASK, is_end, config, noise)
    assert policy.rows[:2] == [2, 4]
    for b in range(4):
        alone_noise = RolloutNoise(*(x[b : b + 1] for x in vars(noise).values()))
        alone = denoise(Toy(), prompt_BL[b : b + 1], attention_BL[b : b + 1], MASK, is_end, config, alone_noise)
        for name, value in vars(alone).items():
            torch.testing.assert_close(vars(together)[name][b : b + 1], value)


def test_rows_leave_once_nothing_before_their_end_is_hidden():
    # Positions 1, 2 and 4 end the text for certain; in random order some row has 0 and 1 before the others.
    for seed in range(3):
        rows = []

        def policy(canvas_BL, attention_BL, at_N, rows=rows):
            rows.append(len(canvas_BL))
            return fixed_ends(canvas_BL, attention_BL, at_N)

        rollout = run(policy, RolloutConfig(max_completion_length=C, steps=C, confidence="origin"), seed)
        open_BC = rollout.unmask_step_BC == C  # never committed
        assert open_BC.any() and not (open_BC & rollout.completion_mask_BC).any()
        assert (rollout.completion_BC[open_BC] == END).all()
        last_B = torch.where(open_BC, -1, rollout.unmask_step_BC).amax(1)
        assert rows == [int((last_B >= t).sum()) for t in range(int(last_B.max()) + 1)]


@pytest.mark.parametrize("guided", [False, True])
def test_committing_above_a_threshold_takes_fewer_steps_and_leaves_no_hole(guided):
    slow, fast = Toy(scale=2.0), Toy(scale=2.0)
    guidance = toy_guide("entrgi") if guided else None
    config = RolloutConfig(max_completion_length=C, steps=C)
    run(slow, config, guidance=guidance)
    rollout = run(fast, dataclasses.replace(config, commit_above=0.5), guidance=guidance)
    assert fast.calls < slow.calls
    assert not (rollout.completion_BC == MASK).any()
    counted_BC = rollout.completion_mask_BC
    assert rollout.behaviour_logp_BC[counted_BC].isfinite().all() and (rollout.unmask_step_BC[counted_BC] < C).all()
    # Nothing is that sure: the same as without.
    for name, value in vars(run(Toy(), dataclasses.replace(config, commit_above=0.9999), guidance=guidance)).items():
        assert torch.equal(value, vars(run(Toy(), config, guidance=guidance))[name])


def test_without_guidance_both_logps_are_the_same():
    config = RolloutConfig(max_completion_length=C, steps=4)
    for guidance in (None, toy_guide("none")):
        rollout = run(Toy(), config, guidance=guidance)
        assert torch.equal(rollout.behaviour_logp_BC, rollout.policy_logp_BC)
        assert (rollout.policy_logp_BC < 0).any()
    guided = run(Toy(), config, guidance=toy_guide())
    assert not torch.allclose(guided.behaviour_logp_BC, guided.policy_logp_BC)


def test_a_token_outside_the_policys_own_support_has_logp_minus_infinity():
    config = RolloutConfig(max_completion_length=C, steps=3, top_k=2, top_p=1.0)
    strong = toy_guide()
    strong = Guide(strong.reward, strong.embedding_VD, GuidanceConfig(kind="expectation", steps=5, eta=2.0))
    rollout = run(Toy(), config, guidance=strong)
    assert torch.isneginf(rollout.policy_logp_BC).any()
    assert torch.isfinite(rollout.behaviour_logp_BC).all()  # what was sampled was possible


@pytest.mark.parametrize("guided", [False, True])
def test_recorded_logps_are_those_of_the_canvas_before_each_step(guided, dream_dir):
    policy = load_policy(ModelConfig(path=str(dream_dir)))
    config = RolloutConfig(max_completion_length=8, steps=5, temperature=0.7, top_k=20, top_p=0.9)
    prompt_BL, attention_BL = policy.encode_prompts(PROMPTS[:3], 16)
    guidance = None
    if guided:
        direction_D = torch.tensor([1.0, -1.0, 2.0])
        table_VD = torch.randn(policy.vocab_size, 3, generator=torch.Generator().manual_seed(0))
        guidance = Guide(
            lambda x_BCD, a_BC, rows_B: (x_BCD @ direction_D).sum(1), table_VD, GuidanceConfig(kind="expectation")
        )
    noise = noise_for(config, 0, guidance)
    rollout = denoise(policy.logits, prompt_BL, attention_BL, policy.mask_id, policy.is_end, config, noise, guidance)
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


def fixed_ends(canvas_BL, attention_BL, at_N):
    """Positions 1, 2 and 4 of the completion are end-of-text for certain; the others are unsure between two words."""
    logits_BLV = torch.full((*canvas_BL.shape, V), float("-inf"))
    logits_BLV[..., [2, 3]] = torch.tensor([0.0, 0.3])
    ends = [4 + c for c in (1, 2, 4)]
    logits_BLV[:, ends] = float("-inf")
    logits_BLV[:, ends, END] = 0.0
    return logits_BLV.flatten(0, 1)[at_N]


@pytest.mark.parametrize("rule", RULES)
def test_deferred_end_of_text_is_committed_last(rule):
    config = RolloutConfig(max_completion_length=C, steps=C, confidence=rule, defer_eos=True)
    step_BC = run(fixed_ends, config).unmask_step_BC
    assert (step_BC[:, [1, 2, 4]] >= 3).all() and (step_BC[:, [0, 3, 5]] < 3).all()


def test_sure_end_of_text_is_committed_first_unless_deferred():
    step_BC = run(fixed_ends, RolloutConfig(max_completion_length=C, steps=C)).unmask_step_BC
    assert (step_BC[:, [1, 2, 4]] < 3).all()


def test_completion_mask_ends_with_the_first_end_token():
    config = RolloutConfig(max_completion_length=C, steps=C)
    assert run(fixed_ends, config).completion_mask_BC.tolist() == [[True, True, False, False, False, False]] * 3
    endless = run(Toy(end_bias=-100.0), config)
    assert endless.completion_mask_BC.all()


def test_same_seed_same_rollout_and_no_mask_token_remains():
    config = RolloutConfig(max_completion_length=C, steps=3, confidence="origin", position_temperature=0.5)
    torch.manual_seed(1)
    one = run(Toy(), config, seed=5, guidance=toy_guide("aps"))
    torch.manual_seed(2)  # the global generator has no say
    two = run(Toy(), config, seed=5, guidance=toy_guide("aps"))
    other = run(Toy(), config, seed=6, guidance=toy_guide("aps"))
    for name, value in vars(one).items():
        assert torch.equal(value, vars(two)[name]), name
    assert not torch.equal(one.canvas_BL, other.canvas_BL)
    for rollout in (one, other):
        assert not (rollout.completion_BC == MASK).any()


def test_rollout_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    run(Toy(), RolloutConfig(max_completion_length=C, steps=3), guidance=toy_guide("aps"))
    assert torch.equal(torch.get_rng_state(), before)


def test_stats_count_committed_tokens_their_entropy_and_those_whose_best_guess_moved():
    def changed_share(stats):
        return float(torch.stack(stats.changed).sum() / torch.stack(stats.guided).sum())

    config = RolloutConfig(max_completion_length=C, steps=2)
    unguided, weak, strong = DenoiseStats(), DenoiseStats(), DenoiseStats()
    run(Toy(), config, guidance=toy_guide("none"), stats=unguided)
    base = toy_guide()
    run(Toy(), config, 0, Guide(base.reward, base.embedding_VD, GuidanceConfig("expectation", 1, 1e-6)), weak)
    run(Toy(), config, 0, Guide(base.reward, base.embedding_VD, GuidanceConfig("expectation", 9, 3.0)), strong)
    assert unguided.changed == []
    assert changed_share(weak) == 0
    assert 0 < changed_share(strong) <= 1
    assert int(torch.stack(strong.committed).sum()) == 3 * C
    # The policy's own entropy, which no guidance changes where the tokens before are the same: in the first step.
    assert strong.entropy[0] == unguided.entropy[0] and 0 < strong.entropy[0] < 3 * C * math.log(V)
    entrgi = DenoiseStats()
    run(Toy(), config, guidance=toy_guide("entrgi"), stats=entrgi)
    assert {q: [n for _, n in pairs] for q, pairs in entrgi.weight.items()} == {
        1: [3 * C],
        2: [],
        3: [3 * C // 2],
        4: [],
    }
    assert all(0 < w / n < 1 for pairs in entrgi.weight.values() for w, n in pairs)
    assert not any(strong.weight.values())  # of no other guidance
