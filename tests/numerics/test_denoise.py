"""The unmasking loop against a slow version of it: loops over steps, rows and positions, plain Python numbers."""

import itertools
import math

import pytest
import torch
from checkpoints import PROMPTS
from toys import noise_for, random_guide, roll_out, steered

from rgrl.config import GuidanceConfig, RolloutConfig
from rgrl.rewards import load_classifier
from rgrl.rollout.denoise import DenoiseStats, commit_schedule, denoise
from rgrl.rollout.guidance import Hidden
from rgrl.rollout.sampling import Support, certainty, most_confident, support_of
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
    """Tempered and truncated by a full sort: the log-probability of each token of the support, the likeliest first."""
    scaled = [x / (config.temperature or 1.0) for x in logits_V.tolist()]
    order = sorted(range(len(scaled)), key=scaled.__getitem__, reverse=True)[: config.top_k or len(scaled)]
    weight = {v: math.exp(scaled[v] - scaled[order[0]]) for v in order}
    kept, mass, total = [], 0.0, sum(weight.values())
    for v in order:
        if mass >= config.top_p * total:
            break
        kept.append(v)
        mass += weight[v]
    return {v: math.log(weight[v] / mass) if weight[v] > 0 else -math.inf for v in kept}


def quantile(logp, u, by_rank):
    """The token at quantile u of the support: counted from the most likely one on, or else by token id."""
    total = 0.0
    for v in logp if by_rank else sorted(logp):
        total += math.exp(logp[v])
        if total > u:
            return v
    raise AssertionError(f"{u} is beyond {total}")


def slow_confidence(rule, logp, token, u):
    if rule == "origin":
        return u
    if rule == "maskgit_plus":
        return math.exp(logp.get(token, -math.inf))
    p = [math.exp(x) for x in logp.values()]
    if rule == "topk_margin":
        best, second = sorted([*p, 0.0], reverse=True)[:2]
        return best - second
    return sum(x * math.log(x) for x in p if x > 0)


class TieError(Exception):
    """Rounding decides which of two positions is committed: they are nearly, but not exactly, equally sure."""


def slow_certainty(logits_V, config):
    """Log-odds of the best token against the other candidates, before temperature and nucleus."""
    best, *others = sorted(logits_V.tolist(), reverse=True)[: config.top_k if config.top_k > 1 else None]
    total = sum(math.exp(x - best) for x in others)
    return -math.log(total) if total > 0 else math.inf


def certain(logits_V):
    """The log-probabilities of a sampler that takes the most likely token."""
    values = logits_V.tolist()
    return {values.index(max(values)): 0.0}


def commits(ranked, k):
    """The k first of [(confidence, certainty, place, ...)]: the most confident, the most certain, the leftmost."""
    ranked = sorted(ranked, key=lambda item: (-item[0], -item[1], item[2]))
    if k < len(ranked):
        last, following = ranked[k - 1], ranked[k]
        for a, b in zip(last[:2], following[:2], strict=True):
            if a != b:
                if math.isclose(a, b, abs_tol=1e-6):
                    raise TieError
                break
    return ranked[:k]


def slow_denoise(policy, config, seed, guide, prompts):
    """Section 1 of the method, with the same random numbers as the loop under test.

    In blocks of equally many steps, every step with the whole canvas.
    """
    (prompt_BL, attention_BL), mask_id, is_end = prompts, policy.mask_id, policy.is_end
    B, width = prompt_BL.shape
    T, noise = config.steps, noise_for(config, B, guide, seed)
    block = config.block_length or C
    steps_of_block = T * block // C
    canvas = [row + [mask_id] * C for row in prompt_BL.tolist()]
    attention = torch.cat([attention_BL, torch.ones(B, C, dtype=torch.bool)], 1)
    step, behaviour, own = ([[None] * C for _ in range(B)] for _ in range(3))
    for t in range(T):
        i, s = divmod(t, steps_of_block)
        end = (i + 1) * block
        # Of a block of C written in T steps, C (T - s - 1) / T should be hidden after step s, rounded up.
        hidden_after = -(-block * (steps_of_block - s - 1) // steps_of_block)
        hidden = [[c for c in range(end) if canvas[b][width + c] == mask_id] for b in range(B)]
        k = len(hidden[0]) - hidden_after
        assert k > 0
        ids = torch.tensor(canvas)
        at_N = torch.tensor([b * (width + C) + width + c for b in range(B) for c in hidden[b]])
        policy_NV = guided_NV = policy.logits(ids, attention, at_N)
        if guide is not None:  # test_guidance.py compares this part with a slow version of its own
            shown = ids[:, width : width + end]  # guidance sees nothing of later blocks
            hidden_N = (shown == mask_id).flatten().nonzero()[:, 0]
            u_MN = torch.stack([u_BC[:, :end].flatten()[hidden_N] for u_BC in noise.hard_BTMC[:, t].unbind(1)])
            guided_NV, _ = steered(policy_NV, Hidden(shown, hidden_N, torch.arange(B)), guide, config, is_end, u_MN)
        n = 0
        for b in range(B):
            ranked = []
            for c in hidden[b]:
                own_logp = log_distribution(policy_NV[n], config)
                logp = own_logp if guide is None else log_distribution(guided_NV[n], config)
                # Top-k sorts them, so that quantiles count from the most likely one on.
                by_rank = 0 < config.top_k < policy_NV.shape[1]
                token = quantile(logp, noise.token_BTC[b, t, c].item(), by_rank)
                drawn, own_drawn = logp, own_logp
                if config.temperature == 0:  # whatever is most likely, and certain
                    drawn, own_drawn = certain(guided_NV[n]), certain(policy_NV[n])
                    [token] = drawn
                u = noise.order_BTC[b, t, c].item()
                read = logp if config.confidence_from == "guided" else own_logp
                sure = slow_confidence(config.confidence, read, token, u)
                sure -= config.position_temperature * math.log(-math.log(u))
                if config.defer_eos and is_end(torch.tensor(token)):
                    sure = -math.inf
                odds = slow_certainty(policy_NV[n], config)
                ranked.append((sure, odds, c, token, drawn[token], own_drawn.get(token, -math.inf)))
                n += 1
            for _, _, c, token, logp, own_logp in commits(ranked, k):
                canvas[b][width + c] = token
                step[b][c], behaviour[b][c], own[b][c] = t, logp, own_logp
    return canvas, step, behaviour, own


RULES = ["entropy", "maskgit_plus", "topk_margin", "origin"]


def assert_same(policy, config, guide=None, slow_policy=None, prompts=(PROMPT_BL, ATTENTION_BL), seeds=4):
    """The loop under test and the slow one agree, for the first four seeds (or `seeds`) without a tie."""
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
        if compared == seeds:
            return
    raise AssertionError(f"only {compared} seeds without a tie")


@pytest.mark.parametrize("position_temperature", [0.0, 0.6])
@pytest.mark.parametrize("source", ["policy", "guided"])
@pytest.mark.parametrize("rule", RULES)
def test_guided_denoising_equals_the_slow_loop(rule, source, position_temperature):
    order = {"confidence": rule, "confidence_from": source, "position_temperature": position_temperature}
    assert_same(Toy(), settings(4, temperature=0.8, top_p=0.9, top_k=7, **order), toy_guide("entrgi"))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("top_k", [0, 5])
def test_greedy_denoising_takes_the_most_likely_tokens(rule, guided, top_k):
    config = settings(4, temperature=0, top_p=0.9, top_k=top_k, confidence=rule)
    assert_same(Toy(), config, toy_guide("entrgi") if guided else None)


@pytest.mark.parametrize("kind", ["none", "expectation", "aps", "entrgi"])
def test_a_greedy_completion_does_not_depend_on_the_seed(kind):
    guide = None if kind == "none" else toy_guide(kind)
    found = [run(Toy(), settings(3, temperature=0, top_k=5), seed, guide) for seed in range(3)]
    for other in found[1:]:
        assert all(torch.equal(getattr(found[0], name), value) for name, value in vars(other).items())
    assert found[0].behaviour_logp_BC.count_nonzero() == 0
    if guide is None:
        assert torch.equal(found[0].policy_logp_BC, found[0].behaviour_logp_BC)
    else:
        assert set(found[0].policy_logp_BC.flatten().tolist()) == {0.0, -math.inf}


def test_of_equally_likely_tokens_a_greedy_sampler_takes_the_one_with_the_least_id():
    logits_NV = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 1.0, 5.0]])
    for top_k in (0, 3, 4):
        greedy = support_of(logits_NV, 1.0, top_k, 1.0).greedy()
        assert greedy.token(greedy.pick(torch.tensor([0.999, 1e-6, 0.5]))).tolist()[::2] == [1, 3]
        assert greedy.logp(torch.tensor([1, 0, 3]))[::2].tolist() == [0.0, 0.0]
    assert support_of(logits_NV, 1.0, 0, 1.0).greedy().best().tolist() == [1, 0, 3]
    shuffled = Support(torch.tensor([[-1.0, -1.0, -2.0]]), torch.tensor([[7, 3, 1]])).greedy()
    assert shuffled.best().item() == 3 and shuffled.logp_NK.tolist() == [[-math.inf, 0.0, -math.inf]]


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


@pytest.mark.parametrize(
    ("kind", "padded", "blocks"),
    [
        *itertools.product(["none", "expectation", "aps", "entrgi"], [False, True], [{}]),
        ("entrgi", True, {"block_length": 3, "block_cache": False}),
    ],
)
def test_denoising_with_real_models_equals_the_slow_loop(policy, padded, kind, blocks, reward):
    config = settings(4 if blocks else 3, **blocks)
    texts = PROMPTS[:3] if padded else [PROMPTS[0]] * 3
    prompts = policy.encode([policy.format_prompt(text) for text in texts])
    assert bool(prompts[1].all()) != padded
    guide = None
    if kind != "none":
        guide = reward.guidance(GuidanceConfig(kind=kind, steps=2)).guide(Prompts(texts, [{}] * 3))
    assert_same(policy, config, guide, RowByRow(policy), prompts, seeds=2)
    if guide is not None:  # and it is not that nothing was steered
        rollout = run(policy, config, guide=guide, prompts=prompts)
        assert (rollout.behaviour_logp_BC - rollout.policy_logp_BC).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [2, 4, 6])
@pytest.mark.parametrize("defer_eos", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_unguided_denoising_equals_the_slow_loop(rule, defer_eos, steps):
    # End-of-text is likely, so that deferring it changes the order; no truncation here.
    config = settings(steps, temperature=1.3, top_p=1.0, top_k=0, confidence=rule, defer_eos=defer_eos)
    assert_same(Toy(end_bias=1.0), config)


@pytest.mark.parametrize("guide", [None, toy_guide("entrgi")], ids=["unguided", "guided"])
@pytest.mark.parametrize(("steps", "block"), [(4, 3), (6, 2)])
@pytest.mark.parametrize("rule", RULES)
def test_blocks_that_read_the_whole_canvas_equal_the_slow_loop(rule, steps, block, guide):
    config = settings(steps, top_k=7, confidence=rule, block_length=block, block_cache=False)
    assert_same(Toy(), config, guide)


def test_a_text_that_ends_inside_a_block_leaves_after_it():
    # With certainty positions 1, 2 and 4 end the text. Blocks of 3 always write 0, 1 and 2, and nothing else.
    policy = FixedEnds()
    rollout = run(policy, settings(block_length=3, block_cache=False, confidence="origin"))
    open_BC = rollout.unmask_step_BC == C
    assert open_BC[:, 3:].all() and not open_BC[:, :2].any() and len(policy.rows) <= 3
    assert (rollout.completion_BC[open_BC] == END).all()


# ------------------------------------------------------------------------------------------------------------ ties
SHARP = {"temperature": 0.1, "top_p": 0.9}  # leaves one token at most places, whose confidences are equal


@pytest.mark.parametrize("top_k", [0, 1, 7])
@pytest.mark.parametrize("source", ["policy", "guided"])
@pytest.mark.parametrize("rule", ["entropy", "maskgit_plus", "topk_margin"])
def test_equally_confident_places_are_committed_as_in_the_slow_loop(rule, source, top_k, monkeypatch):
    config, guide = settings(4, **SHARP, top_k=top_k, confidence=rule, confidence_from=source), toy_guide("entrgi")
    assert_same(Toy(), config, guide)
    monkeypatch.setitem(globals(), "slow_certainty", lambda *_: 0.0)
    with pytest.raises(AssertionError):  # it is not that nothing was tied
        assert_same(Toy(), config, guide)


def equal_numbers_reversed(topk):
    """`torch.topk` as on a device that takes equal numbers in the opposite order."""

    def reversed_topk(x, k, dim=-1, **how):
        values, index = topk(x.flip(dim), k, dim, **how)
        return torch.return_types.topk((values, x.shape[dim] - 1 - index))

    return reversed_topk


@pytest.mark.parametrize("config", [{}, {"defer_eos": True}, {"commit_above": 0.999}, {"top_k": 0}, {"top_k": 1}])
def test_no_order_of_equal_numbers_in_topk_changes_a_rollout(config, monkeypatch):
    config = settings(4, **SHARP | {"top_k": 7} | config)
    before = run(Toy(end_bias=1.0), config, guide=toy_guide())
    monkeypatch.setattr(torch.Tensor, "topk", equal_numbers_reversed(torch.Tensor.topk))
    after = run(Toy(end_bias=1.0), config, guide=toy_guide())
    for name, value in vars(before).items():
        assert torch.equal(vars(after)[name], value), name


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_most_confident_by_sorting(k):
    rng = torch.Generator().manual_seed(k)
    confidence_BC, certainty_BC = (torch.randint(0, 3, (200, 8), generator=rng).float() for _ in range(2))
    hidden_BC = torch.rand(200, 8, generator=rng) < 0.7
    confidence_BC, certainty_BC = (x.masked_fill(~hidden_BC, -math.inf) for x in (confidence_BC, certainty_BC))
    commit_BC = most_confident(confidence_BC, certainty_BC, k)
    for b in range(200):
        ranked = [(confidence_BC[b, c].item(), certainty_BC[b, c].item(), c) for c in range(8) if hidden_BC[b, c]]
        assert commit_BC[b].nonzero()[:, 0].tolist() == sorted(c for *_, c in commits(ranked, k))
    also_BC = hidden_BC & (torch.rand(200, 8, generator=rng) < 0.3)
    assert torch.equal(most_confident(confidence_BC, certainty_BC, k, also_BC), commit_BC | also_BC)


def test_places_that_nothing_tells_apart_are_written_from_left_to_right():
    # The two kinds of place are alike among themselves; ends are deferred, and the first of them ends the text.
    assert run(FixedEnds(), settings(defer_eos=True)).unmask_step_BC.tolist() == [[0, 3, C, 1, C, 2]] * 3


@pytest.mark.parametrize("top_k", [0, 1, 5, 99])
def test_certainty_is_the_log_odds_of_the_best_token(top_k):
    logits_NV = 3 * torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    logits_NV[0] = torch.tensor([30.0, *[-30.0] * 8])  # its probability is 1 in float32
    logits_NV[1] = torch.tensor([0.0, *[-math.inf] * 8])
    logits_NV[2, 3:5] = 20.0
    own, config = support_of(logits_NV, 0.1, top_k, 0.9), settings(top_k=top_k)
    expected = [slow_certainty(logits_V, config) for logits_V in logits_NV]
    torch.testing.assert_close(certainty(logits_NV, own), torch.tensor(expected))
    assert 59 > expected[0] > 55 and expected[1] == math.inf and -1e-6 < expected[2] < 1e-6


def test_equally_confident_places_do_not_depend_on_the_rows_beside_them(policy):
    config = settings(**SHARP | {"temperature": 0.01})
    prompt_BL, attention_BL = policy.encode([policy.format_prompt(text) for text in PROMPTS[:4]])
    noise = noise_for(config, 4)
    with torch.no_grad():
        own = support_of(policy.logits(prompt_BL, attention_BL, attention_BL), 0.01, config.top_k, config.top_p)
    assert (own.entropy() == 0).float().mean() > 0.5
    whole = vars(denoise(policy, prompt_BL, attention_BL, config, noise))
    for rows in ([3, 2, 1, 0], [2], [0, 3]):
        rows_A = torch.tensor(rows)
        some = vars(denoise(policy, prompt_BL[rows_A], attention_BL[rows_A], config, noise.rows(rows_A)))
        for name, value in some.items():
            torch.testing.assert_close(value, whole[name][rows_A], rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("guided", [False, True])
def test_recorded_logps_are_those_of_the_canvas_before_each_step(guided, block, policy):
    sampler = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "block_length": block, "block_cache": False}
    config = RolloutConfig(max_completion_length=8, steps=5, **sampler)
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
                expected = log_distribution(logits_LV[width + c], config).get(ids[width + c].item(), -math.inf)
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
