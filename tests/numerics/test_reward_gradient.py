"""The reward's gradient in the update, on a model with five tokens: against loops, finite differences, enumeration."""

import dataclasses
import itertools
import math

import pytest
import torch
from toys import END, MASK, WORDS, Toy, V, random_guide, roll_out, rollout_of

from rgrl.algo.reward_gradient import (
    draw_steps,
    expand,
    expected_text,
    first_order,
    kl_by_row,
    state_before,
    term_sums,
    text_tokens,
)
from rgrl.config import GradientConfig, GuidanceConfig, RolloutConfig
from rgrl.models.readout import kl_to_reference
from rgrl.seeds import generators

C, PROMPT, D = 4, 2, 5
SAMPLER = RolloutConfig(max_completion_length=C, steps=C, temperature=0.8, top_k=3, top_p=0.9)
BLENDS = ("entrgi", "expectation", "aps")
# Completions with the step of each token: whole, ended, ended with an early end, one word, nothing but the end.
ROWS = [
    ([0, 2, 1, 0], [3, 0, 1, 2]),
    ([1, 2, END, END], [2, 0, 1, 4]),
    ([1, 1, END, END], [1, 2, 0, 4]),
    ([2, END, END, END], [0, 1, 4, 4]),
    ([END, END, END, END], [0, 4, 4, 4]),
]


def rollout(rows=ROWS):
    token_BC, step_BC = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    ended_BC = (token_BC == END).long().cumsum(1)
    mask_BC = (ended_BC == 0) | ((ended_BC == 1) & (token_BC == END))
    prompt_BP = torch.tensor([0, 1]).expand(len(rows), PROMPT)
    return rollout_of(torch.cat([prompt_BP, token_BC], 1), mask_BC, step_BC=step_BC)


def guide(**changes):
    return dataclasses.replace(random_guide(V, GuidanceConfig(), D=D, dtype=torch.float64), **changes)


def state(step=0, rows=ROWS, block=0, given=None):
    r = rollout(rows)
    numbers_B = torch.arange(len(rows))
    steps_B = torch.full((len(rows),), step) if isinstance(step, int) else torch.tensor(step)
    return state_before(r, numbers_B, steps_B, given or guide(), lambda ids: ids == END, block)


def read(toy, at, given=None, sampler=SAMPLER, reference=None):
    """The values of the policy at a state, as the update takes them."""
    given = given or guide()
    text_V = text_tokens(given, toy.is_end)
    canvas = at.canvas(MASK), at.rollout.attention_BL, at.at_BL, at.token_N
    readouts = {"text": lambda p: expected_text(p.logits_NV, p.token_N, given.embedding_VD, text_V, sampler)}
    if reference is None:
        return toy.read_out(*canvas, readouts)
    with torch.no_grad():
        states = {"reference_NH": reference.logits(*canvas[:3])}
    return toy.read_out(*canvas, readouts | {"kl_to_reference": kl_to_reference}, states)


def slow_places(toy, at):
    """(row, place, logits of the possible tokens) of every asked place, one row at a time."""
    for b in range(len(at.asked_BC)):
        everywhere_1L = torch.ones(1, PROMPT + C, dtype=torch.bool)
        logits_LV = toy.logits(at.canvas(MASK)[b : b + 1], everywhere_1L, everywhere_1L)
        for i in at.asked_BC[b].nonzero()[:, 0].tolist():
            yield b, i, [logits_LV[PROMPT + i, v] for v in (*WORDS, END)]


def slow_candidates(logits, sampler=SAMPLER):
    """The words in the top-k and nucleus of one place."""
    scaled = [x.item() / sampler.temperature for x in logits]
    order = sorted(range(4), key=lambda v: -scaled[v])[: sampler.top_k or 4]
    total, kept, mass = sum(math.exp(scaled[v]) for v in order), [], 0.0
    for v in order:
        if mass < sampler.top_p:
            kept.append(v)
        mass += math.exp(scaled[v]) / total
    return [v for v in kept if v != END]


def slow_loss(toy, at, g, kept, kappa, reference):
    """The loss with the gradients `g` and the candidates `kept` of each (row, place) held."""
    loss = torch.zeros((), dtype=torch.float64)
    embedding_VD = guide().embedding_VD
    others = {(b, i): logits for b, i, logits in slow_places(reference, at)}
    for b, i, logits in slow_places(toy, at):
        if (b, i) in g and kept[b, i]:
            p = torch.stack([logits[v] / SAMPLER.temperature for v in kept[b, i]]).softmax(0)
            loss = loss - sum(p[j] * (g[b, i] * embedding_VD[v]).sum() for j, v in enumerate(kept[b, i]))
        p, q = (torch.stack(x).log_softmax(0) for x in (logits, others[b, i]))
        loss = loss + kappa * (p.exp() * (p - q)).sum() / at.rollout.completion_mask_BC[b].sum()
    return loss


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("step", [0, 1, [3, 2, 1, 1, 0]])
def test_the_gradient_is_that_of_finite_differences_with_g_w_and_the_candidates_held(blend, step):
    toy, reference, at, kappa = Toy(PROMPT + C, seed=1, scale=1.5), Toy(PROMPT + C, seed=2), state(step), 0.3
    values = read(toy, at, reference=reference)
    found = expand(guide(), at, values, blend)
    loss = kappa * kl_by_row(values["kl_to_reference"], at).sum() - first_order(found.g_ND, values["soft"])
    parameters = list(toy.parameters())
    fast = torch.autograd.grad(loss, parameters)
    places = at.asked_BC.nonzero().tolist()
    g = {(b, i): found.g_ND[n] for n, (b, i) in enumerate(places) if found.soft_N[n]}
    with torch.no_grad():
        kept = {(b, i): slow_candidates(logits) for b, i, logits in slow_places(toy, at)}
        assert slow_loss(toy, at, g, kept, kappa, reference).item() == pytest.approx(loss.item(), abs=1e-9)
        rng = torch.Generator().manual_seed(0)
        for p, g_p in zip(parameters, fast, strict=True):
            direction = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            both = []
            for side in (1e-5, -1e-5):
                p.add_(direction, alpha=side)
                both.append(slow_loss(toy, at, g, kept, kappa, reference).item())
                p.sub_(direction, alpha=side)
            assert (both[0] - both[1]) / 2e-5 == pytest.approx((g_p * direction).sum().item(), rel=1e-5, abs=1e-8)
    assert max(g_p.abs().max() for g_p in fast) > 1e-2 and len({len(k) for k in kept.values()}) > 1


@pytest.mark.parametrize("blend", BLENDS)
def test_the_reward_model_is_shown_the_blend_and_the_finished_text(blend):
    """Against the same blend made by loops, and autograd through the whole of it, weights held."""
    toy, at, given = Toy(PROMPT + C, seed=1), state(1), guide()
    values = read(toy, at)
    found = expand(given, at, values, blend)
    expected_BCD = given.embedding_VD[at.rollout.completion_BC].clone()
    leaves = {}
    for n, (b, i) in enumerate(at.asked_BC.nonzero().tolist()):
        if not found.soft_N[n]:
            continue
        logits = [x for bb, ii, places in slow_places(toy, at) if (bb, ii) == (b, i) for x in places]
        kept, plain = slow_candidates(logits), torch.stack(logits).softmax(0)
        p = torch.stack([logits[v] / SAMPLER.temperature for v in kept]).softmax(0)
        soft_D = sum(p[j] * given.embedding_VD[v] for j, v in enumerate(kept)).detach()
        entropy = -(plain * plain.log()).sum().item() / math.log(V)
        w = {"entrgi": entropy, "expectation": 0.0, "aps": 1.0}[blend]
        hard_D = given.embedding_VD[at.rollout.completion_BC[b, i]]
        leaves[n] = (soft_D + w * (hard_D - soft_D)).requires_grad_()
        expected_BCD = expected_BCD.index_put((torch.tensor(b), torch.tensor(i)), leaves[n])
    reward_B = given.reward(expected_BCD, at.shown_BC, at.rows_B)
    gradients = torch.autograd.grad(reward_B.sum(), list(leaves.values()))
    torch.testing.assert_close(found.reward_B, reward_B.detach())
    for n, g_D in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(found.g_ND[n], g_D)
    assert (found.g_ND[~found.soft_N] == 0).all() and 4 <= len(leaves) < len(found.soft_N)
    if blend == "aps":  # the reward of the text itself
        torch.testing.assert_close(
            found.reward_B, given.reward(given.embedding_VD[at.rollout.completion_BC], at.shown_BC, at.rows_B)
        )


def test_it_is_the_policy_gradient_where_all_places_are_written_at_once_under_a_reward_that_adds_up():
    toy, given = Toy(PROMPT + C, seed=3), guide()
    u_CD = torch.randn(C, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    given = dataclasses.replace(given, reward=lambda x_BCD, a_BC, rows_B: (x_BCD * u_CD * a_BC[..., None]).sum((1, 2)))
    sampler = dataclasses.replace(SAMPLER, top_k=0, top_p=1.0)
    at = state(0, [([0, 2, 1, 0], [0, 1, 2, 3])], given=given)
    values = read(toy, at, given, sampler)
    fast = torch.autograd.grad(first_order(expand(given, at, values, "entrgi").g_ND, values["soft"]), toy.parameters())
    logits_CV = toy.logits(at.canvas(MASK), at.rollout.attention_BL, at.at_BL)[:, : len(WORDS)]
    p_CV = (logits_CV / sampler.temperature).softmax(1)
    expected = torch.zeros((), dtype=torch.float64)
    for text in itertools.product(WORDS, repeat=C):
        reward = sum((u_CD[i] * given.embedding_VD[v]).sum() for i, v in enumerate(text))
        expected = expected + math.prod(p_CV[i, v] for i, v in enumerate(text)) * reward
    for g, slow in zip(fast, torch.autograd.grad(expected, toy.parameters()), strict=True):
        torch.testing.assert_close(g, slow, rtol=0, atol=1e-10)
    assert max(g.abs().max() for g in fast) > 1e-2


# ----------------------------------------------------------------------------------------------------- candidates


def test_what_ends_or_leaves_the_text_is_no_candidate_and_the_rest_sums_to_one():
    unseen_V = torch.tensor([False, True, False, False, False])
    given = guide(unseen_V=unseen_V, embedding_VD=torch.eye(V, dtype=torch.float64))
    text_V = text_tokens(given, lambda ids: ids == END)
    assert text_V.tolist() == [True, False, True, False, True]  # the policy never writes the mask (the last)
    logits_NV = torch.tensor([[0.1, 3.0, 0.3, 2.0, -math.inf], [0.0, 0.0, 0.0, 9.0, -math.inf]]).double()
    for top_k in (0, 4):
        sampler = dataclasses.replace(SAMPLER, top_k=top_k, top_p=1.0)
        leaf_NV = logits_NV.clone().requires_grad_()
        values = expected_text(leaf_NV, torch.tensor([1, 2]), given.embedding_VD, text_V, sampler)
        expected = torch.tensor([0.1, 0.3]).double().div(0.8).softmax(0)
        torch.testing.assert_close(values["soft"][0][[0, 2]], expected)
        assert (values["soft"][:, [1, 3, 4]] == 0).all() and values["some"].all()
        assert values["inside"].tolist() == [False, True]
        (g_NV,) = torch.autograd.grad(values["soft"][:, 2].sum(), leaf_NV)
        assert (g_NV[:, [1, 3, 4]] == 0).all() and (g_NV[:, [0, 2]] != 0).all()
    ends = dataclasses.replace(SAMPLER, top_k=1)
    leaf_NV = logits_NV.clone().requires_grad_()
    values = expected_text(leaf_NV, torch.tensor([1, 2]), given.embedding_VD, text_V, ends)
    assert values["some"].tolist() == [False, False] and (values["soft"] == 0).all()
    (g_NV,) = torch.autograd.grad(values["soft"].sum(), leaf_NV)
    assert (g_NV == 0).all(), "no candidate, no gradient, and none that is not a number"


def test_a_place_without_a_candidate_keeps_its_token_and_learns_nothing():
    toy, at = Toy(PROMPT + C, seed=1), state(0)
    toy.out_HV.data[:, END] *= 0
    logits = toy.logits

    def sure_of_the_end(*canvas):
        return logits(*canvas).index_fill(1, torch.tensor([END]), 99.0)

    toy.logits = sure_of_the_end
    values = read(toy, at)
    found = expand(guide(), at, values, "entrgi")
    assert not values["some"].any() and not found.soft_N.any() and (found.g_ND == 0).all()
    table_VD = guide().embedding_VD
    written_B = guide().reward(table_VD[at.rollout.completion_BC], at.shown_BC, at.rows_B)
    torch.testing.assert_close(found.reward_B, written_B)


# ------------------------------------------------------------------------------------------------- zero gradients


def test_nothing_moves_where_the_reward_is_constant():
    toy, at = Toy(PROMPT + C, seed=1), state(0)
    values = read(toy, at)
    blind = [1, 3]  # places that the reward does not read

    def reward(x_BCD, a_BC, rows_B):
        seen_C = torch.tensor([i not in blind for i in range(C)])
        return torch.tanh((x_BCD * (a_BC & seen_C)[..., None]).sum((1, 2)))

    found = expand(guide(reward=reward), at, values, "entrgi")
    place_N = at.asked_BC.nonzero()[:, 1]
    at_blind_N = torch.tensor([i in blind for i in place_N.tolist()])
    assert (found.g_ND[at_blind_N] == 0).all() and (found.g_ND[~at_blind_N & found.soft_N] != 0).any()
    constant = expand(guide(reward=lambda x, a, rows: (0 * x).sum((1, 2)) + 3.0), at, values, "entrgi")
    gradients = torch.autograd.grad(first_order(constant.g_ND, values["soft"]), toy.parameters())
    assert all((g == 0).all() for g in gradients)


def test_gradients_that_are_not_finite_are_left_out_and_counted():
    toy, at = Toy(PROMPT + C, seed=1), state(0)
    values = read(toy, at)
    places = at.soft_BC.nonzero().tolist()
    bad = places[1]

    def reward(x_BCD, a_BC, rows_B):
        rest = x_BCD.sum((1, 2))
        rest[bad[0]] = rest[bad[0]] + (0 * x_BCD[bad[0], bad[1]]).sqrt().sum()  # d sqrt at 0
        return rest

    found = expand(guide(reward=reward), at, values, "entrgi")
    n = at.asked_BC.nonzero().tolist().index(bad)
    assert found.broken == 1 and (found.g_ND[n] == 0).all() and found.g_ND.isfinite().all()
    assert (found.g_ND[found.soft_N] != 0).any(1).sum() == found.soft_N.sum() - 1
    assert term_sums(found, values, 1)["gradient/broken"] == 1


# --------------------------------------------------------------------------------------------------------- states


def test_a_state_asks_about_what_is_hidden_but_for_what_follows_an_end_that_is_shown():
    at = state(0)
    assert at.hidden_BC.all() and at.asked_BC.all(), "nothing is written: the end is not known yet"
    assert at.soft_BC.tolist() == [
        [True] * 4,
        [True] * 2 + [False] * 2,
        [True] * 2 + [False] * 2,
        [True] + 3 * [False],
        [False] * 4,
    ]
    at = state(1)
    assert at.hidden_BC.tolist() == [
        [True, False, True, True],
        [True, False, True, True],
        [True, True, False, True],
        [False, True, True, True],
        [False, True, True, True],
    ]
    # The third row shows its end at place 2, the fifth at place 0.
    assert at.asked_BC[2].tolist() == [True, True, False, False] and not at.asked_BC[4].any()
    assert torch.equal(at.asked_BC[[0, 1, 3]], at.hidden_BC[[0, 1, 3]])
    canvas_BL = at.canvas(MASK)
    assert torch.equal(canvas_BL[:, :PROMPT], at.rollout.canvas_BL[:, :PROMPT])
    assert torch.equal(canvas_BL[:, PROMPT:] == MASK, at.hidden_BC)
    assert torch.equal(at.token_N, at.rollout.completion_BC[at.asked_BC])


def test_an_end_token_that_the_guide_reads_stays_as_it_is():
    given = guide(attend_eos=True)
    at = state(0, given=given)
    assert at.shown_BC[1].tolist() == [True, True, True, False] and at.soft_BC[1].tolist() == [True, True, False, False]


def test_a_row_with_nothing_to_ask_counts_as_a_row_of_zero():
    toy, reference = Toy(PROMPT + C, seed=1), Toy(PROMPT + C, seed=2)
    at = state(1, ROWS[4:])
    values = read(toy, at, reference=reference)
    found = expand(guide(), at, values, "entrgi")
    loss = kl_by_row(values["kl_to_reference"], at).sum() - first_order(found.g_ND, values["soft"])
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, toy.parameters()))
    assert term_sums(found, values, 2)["n"] == 0.5
    # Beside others it changes none of their numbers.
    alone, beside = state(1, ROWS[:1]), state(1, [ROWS[0], ROWS[4]])
    for x in (alone, beside):
        values = read(toy, x, reference=reference)
        kl_B = kl_by_row(values["kl_to_reference"], x)
        torch.testing.assert_close(
            kl_B[0], kl_by_row(read(toy, alone, reference=reference)["kl_to_reference"], alone)[0]
        )
    assert kl_B[1] == 0 and kl_B[0] > 0


def test_a_sampler_that_goes_on_after_the_end_changes_nothing():
    """A CPU leaves the rest of an ended row to step T and the end token; a GPU goes on writing it."""
    toy, reference = Toy(PROMPT + C, seed=1), Toy(PROMPT + C, seed=2)
    other = [(row[0][:], row[1][:]) for row in ROWS]
    for b, (first, last) in {1: (3, 3), 2: (3, 3), 3: (2, 2), 4: (1, 1)}.items():
        for i in range(first, C):
            other[b][0][i], other[b][1][i] = i % 3, min(last + i - first, 3)
    config = GradientConfig(draws=3)
    drawn = [draw_steps(rollout(rows), config, SAMPLER, generators(0, 0, range(5), "t"), 2) for rows in (ROWS, other)]
    assert torch.equal(*drawn)
    for step_B in drawn[0].flatten(0, 1):
        losses = []
        for rows in (ROWS, other):
            at = state(step_B.tolist(), rows)
            values = read(toy, at, reference=reference)
            found = expand(guide(), at, values, "entrgi")
            losses.append(kl_by_row(values["kl_to_reference"], at).sum() - first_order(found.g_ND, values["soft"]))
        assert torch.equal(*losses)


def test_with_blocks_only_the_block_that_was_written_is_asked():
    rows = [([0, 2, 1, 0], [1, 0, 3, 2]), ([0, 2, 1, END], [0, 1, 2, 3])]
    for step, asked in ((0, [[1, 1, 0, 0], [1, 1, 0, 0]]), (1, [[1, 0, 0, 0], [0, 1, 0, 0]]), (2, [[0, 0, 1, 1]] * 2)):
        at = state(step, rows, block=2)
        assert at.asked_BC.int().tolist() == asked
        assert torch.equal(at.hidden_BC, state(step, rows).hidden_BC), "the canvas hides the later blocks all the same"


@pytest.mark.parametrize("states", ["uniform", "late"])
@pytest.mark.parametrize("block", [0, 2])
def test_steps_are_drawn_block_by_block_and_up_to_the_last_that_counts(states, block):
    sampler = dataclasses.replace(SAMPLER, block_length=block)
    rows = [([0, 2, 1, 0], [0, 1, 2, 3]), ([1, END, 0, 0], [0, 1, 4, 4]), ([0, 1, END, END], [0, 1, 2, 4])]
    config = GradientConfig(draws=1000, states=states)
    drawn_KB = draw_steps(rollout(rows), config, sampler, generators(0, 0, range(3), "t"), 4).flatten(0, 1)
    late = (lambda u: u**3) if states == "late" else (lambda u: u)

    def within(first, count):
        return {first + i: late((i + 1) / count) - late(i / count) for i in range(count)}

    whole = [within(0, 4), within(0, 2), within(0, 3)]
    halves = [within(0, 2), within(2, 2)], [within(0, 2)], [within(0, 2), within(2, 1)]
    for b in range(3):
        expected = {s: p / len(halves[b]) for half in halves[b] for s, p in half.items()} if block else whole[b]
        for s in range(5):
            assert (drawn_KB[:, b] == s).float().mean().item() == pytest.approx(expected.get(s, 0.0), abs=0.03)


def test_states_of_a_row_depend_on_its_own_numbers_alone_and_are_fresh_for_each_update():
    config = GradientConfig(draws=4)
    all_UKB = draw_steps(rollout(), config, SAMPLER, generators(0, 0, range(5), "t"), 3)
    some_UKB = draw_steps(rollout(ROWS[1:3]), config, SAMPLER, generators(0, 0, range(1, 3), "t"), 3)
    assert torch.equal(all_UKB[:, :, 1:3], some_UKB) and not torch.equal(all_UKB[0], all_UKB[1])


def test_a_real_rollout_has_states_with_something_hidden_at_every_step():
    toy = Toy(PROMPT + C, seed=4)
    made = roll_out(toy, SAMPLER, torch.tensor([[0, 1]] * 20))
    step_KB = draw_steps(made, GradientConfig(draws=8), SAMPLER, generators(0, 0, range(20), "t"), 1)[0]
    for step_B in step_KB:
        at = state_before(made, torch.arange(20), step_B, guide(), toy.is_end)
        assert at.asked_BC.any(1).all() and (made.unmask_step_BC[~at.hidden_BC] < 4).all()


# --------------------------------------------------------------------------------------------------- what is logged


def test_what_is_logged_by_hand():
    toy, at = Toy(PROMPT + C, seed=1), state(0)
    values = read(toy, at, reference=Toy(PROMPT + C, seed=2))
    found = expand(guide(), at, values, "entrgi")
    sums = term_sums(found, values, 2)
    outside = 0
    for b, i, logits in slow_places(toy, at):
        outside += bool(at.soft_BC[b, i]) and int(at.rollout.completion_BC[b, i]) not in slow_candidates(logits)
    assert sums["gradient/outside"] == outside > 0
    assert sums["asked"] == 20 and sums["soft"] == found.soft_N.sum() and sums["n"] == 2.5
    assert sums["gradient/reward"].item() == pytest.approx(found.reward_B.sum().item() / 2)
    assert sums["gradient/kl"].item() == pytest.approx(values["kl_to_reference"].sum().item())
