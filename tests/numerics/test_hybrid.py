"""The hybrid of policy gradient and reward gradient by enumeration: unbiased under its conditions, biased outside."""

import dataclasses
import itertools

import pytest
import torch
from toys import END, MASK, Toy, V, random_guide, roll_out

from rgrl.algo import resolve_algorithm
from rgrl.algo.estimators import ESTIMATORS
from rgrl.algo.objectives import OBJECTIVES
from rgrl.algo.reward_gradient import mean_of_others, surprise, text_gradients
from rgrl.config import Config, GuidanceConfig, LoraConfig, ObjectiveConfig, RewardConfig, RolloutConfig
from rgrl.errors import ConfigError
from rgrl.rollout.denoise import RolloutNoise, denoise
from rgrl.rollout.sampling import draw_uniform, sampled_logp
from rgrl.types import LossInputs

PROMPT, ROWS, C, D = [0, 2], 8_000, 3, 5
OBJECTIVE = ObjectiveConfig(name="hybrid", estimator="trajectory", advantage="leave_one_out")
SAMPLER = RolloutConfig(max_completion_length=C, steps=C, temperature=0.8, top_k=3, top_p=1.0)


def settings(**rollout):
    return dataclasses.replace(SAMPLER, **rollout)


def guide():
    return random_guide(V, GuidanceConfig(), D=D, dtype=torch.float64)


def trajectories(toy, sampler):
    """One rollout of each trajectory that the sampler can take, found by drawing until none is new."""
    rng = torch.Generator().manual_seed(0)  # one for all rows: many generators take long
    shapes = (ROWS, sampler.steps, C), (ROWS, sampler.steps, C), (ROWS, sampler.steps, 0, C)
    noise = RolloutNoise(*(draw_uniform(shape, rng) for shape in shapes))
    prompt_BL = torch.tensor([PROMPT] * ROWS)
    made = denoise(toy, prompt_BL, torch.ones_like(prompt_BL, dtype=torch.bool), sampler, noise)
    keys = torch.cat([made.completion_BC, made.unmask_step_BC], 1).where(made.decided_BC.repeat(1, 2), -1)
    first = {tuple(key): b for b, key in reversed(list(enumerate(keys.tolist())))}
    return made.rows(torch.tensor(sorted(first.values())))


def read(toy, sampler, rollout, g_BCD, estimator="trajectory"):
    """The values of the update for these rows, and which tokens count."""
    table_VD = guide().embedding_VD
    noise = ESTIMATORS[estimator].draw(rollout, ObjectiveConfig(prompt_mask=0.0), [torch.Generator()] * len(g_BCD))

    def values(k, canvas_BL, attention_BL, at_BL, token_N):
        g_ND = g_BCD[at_BL[:, len(PROMPT) :]]
        readouts = {
            "logp": lambda p: sampled_logp(p.logits_NV, p.token_N, sampler.temperature, sampler.top_k, sampler.top_p),
            "surprise": lambda p: surprise(p.logits_NV, p.token_N, g_ND, table_VD, sampler),
        }
        return toy.read_out(canvas_BL, attention_BL, at_BL, token_N, readouts)

    found = ESTIMATORS[estimator].estimate(values, rollout, noise, MASK, OBJECTIVE, torch.ones(len(g_BCD)))
    return found, noise.count_BC


def flat(toy, value):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(toy.parameters()))])


def gradients(toy, sampler, control, of_others=True, estimator="trajectory"):
    """The exact gradient of the mean reward, and the mean of the hybrid's over all pairs of trajectories."""
    every = trajectories(toy, sampler)
    n = len(every.canvas_BL)
    found, _ = read(toy, sampler, every, torch.zeros(n, C, D, dtype=torch.float64))
    p_B = found["logp"].sum(1).exp()
    assert p_B.sum().item() == pytest.approx(1, abs=1e-9) and 10 < n < 200, "not all trajectories were seen"
    text_B = torch.tensor([len({*row}) + 0.7 * row[0] for row in every.completion_BC.tolist()]).double()
    length_B = every.completion_mask_BC.sum(1)
    reward_B = text_B.where(length_B > 1, -1.0) + 0.3 * length_B
    exact = flat(toy, (p_B * reward_B).sum())
    g_BCD = text_gradients(guide(), every, torch.arange(n), toy.is_end)
    pair_2Q = torch.tensor(list(itertools.product(range(n), repeat=2))).T
    q_Q = p_B.detach()[pair_2Q].prod(0)
    rows = pair_2Q.T.flatten()
    both = every.rows(rows)
    given_BCD = mean_of_others(g_BCD[rows], 2) if of_others else g_BCD[rows]
    found, count_BC = read(toy, sampler, both, given_BCD, estimator)
    r_Q2 = reward_B[pair_2Q.T]
    advantage_B = (r_Q2 - r_Q2.flip(1)).flatten()
    x = LossInputs(found["logp"], count_BC, advantage_B, readouts={"surprise": found["surprise"]})
    # Each pair weighted by its probability, as the correction of its rows.
    weighted = dataclasses.replace(x, correction_BC=q_Q.repeat_interleave(2)[:, None].expand_as(found["logp"]) / 2)
    config = dataclasses.replace(OBJECTIVE, control=control)
    return exact, -flat(toy, OBJECTIVES["hybrid"].loss(weighted, config).loss_sum)


@pytest.mark.parametrize("control", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "sampler",
    [settings(), settings(steps=2), settings(confidence="topk_margin"), settings(top_k=0, top_p=0.9)],
)
def test_it_is_unbiased_on_the_exact_trajectory(sampler, control):
    toy = Toy(len(PROMPT) + C, scale=0.7, words=(0, 1))
    exact, mean = gradients(toy, sampler, control)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-5)
    assert exact.abs().max() > 1e-2


@pytest.mark.parametrize(
    "change", [{"of_others": False}, {"estimator": "one_step"}, {"sampler": settings(confidence="maskgit_plus")}]
)
def test_it_is_biased_outside_its_conditions(change):
    """A gradient that knows the row's own tokens; tokens read on another canvas; an order that looks at them."""
    toy = Toy(len(PROMPT) + C, scale=0.7, words=(0, 1))
    given = {"sampler": settings(), "control": 1.0} | change
    if "sampler" in change:
        # The recorded order is taken as given: the probabilities of the trajectories no longer sum to 1.
        with pytest.raises(AssertionError, match="not all trajectories"):
            gradients(toy, **given)
        return
    exact, mean = gradients(toy, **given)
    assert (mean - exact).abs().max() > 1e-3


def test_the_control_takes_noise_away_where_the_reward_is_linear():
    toy = Toy(len(PROMPT) + C, scale=0.7)
    toy.absent_V[END] = True  # an end token is worth what its embedding does not say
    made = roll_out(toy, settings(), torch.tensor([PROMPT] * 400), seed=1)
    u_D = torch.randn(D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    linear = dataclasses.replace(guide(), reward=lambda x, a, rows: ((x @ u_D) * a).sum(1))
    table_VD = linear.embedding_VD
    shown_BC = ~(toy.is_end(made.completion_BC).cumsum(1) > 0)
    reward_B = linear.reward(table_VD[made.completion_BC], shown_BC, None)
    g_BCD = mean_of_others(text_gradients(linear, made, torch.arange(400), toy.is_end), 4)
    found, count_BC = read(toy, settings(), made, g_BCD)
    r_PG = reward_B.view(-1, 4)
    advantage_B = ((r_PG - r_PG.mean(1, keepdim=True)) * 4 / 3).flatten()
    variances = []
    for control in (0.0, 1.0):
        single = []
        for group in range(100):
            rows = slice(4 * group, 4 * group + 4)
            x = LossInputs(
                found["logp"][rows], count_BC[rows], advantage_B[rows], readouts={"surprise": found["surprise"][rows]}
            )
            loss = OBJECTIVES["hybrid"].loss(x, dataclasses.replace(OBJECTIVE, control=control)).loss_sum
            grads = torch.autograd.grad(loss, list(toy.parameters()), retain_graph=True)
            single.append(torch.cat([g.flatten() for g in grads]))
        variances.append(torch.stack(single).var(0).sum().item())
    assert variances[1] < 0.6 * variances[0], variances


def test_others_means_by_hand():
    g_BCD = torch.zeros(4, 2, 1)
    g_BCD[:, 0, 0], g_BCD[:, 1, 0] = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.0, 4.0, 0.0, 0.0])
    # Two groups of two; then one of four, where a place that only one row has counts that row alone.
    assert mean_of_others(g_BCD, 2)[..., 0].tolist() == [[2.0, 4.0], [1.0, 0.0], [6.0, 0.0], [3.0, 0.0]]
    four = mean_of_others(g_BCD, 4)[..., 0]
    assert four[0].tolist() == pytest.approx([11 / 3, 4.0]) and four[1].tolist() == pytest.approx([10 / 3, 0.0])


def test_the_surprise_of_a_token_is_0_in_the_mean_end_tokens_included():
    logits_NV = torch.randn(6, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_NV[:, MASK] = float("-inf")
    table_VD, g_ND = guide().embedding_VD, torch.randn(6, D, dtype=torch.float64)
    for sampler in (settings(), settings(top_k=0, top_p=0.8)):
        total_N = torch.zeros(6, dtype=torch.float64)
        for v in (0, 1, 2, END):
            token_N = torch.full((6,), v)
            p_N = sampled_logp(logits_NV, token_N, sampler.temperature, sampler.top_k, sampler.top_p).exp()
            kept_N = surprise(logits_NV, token_N, g_ND, table_VD, sampler)
            from_support = torch.tensor([inside(logits_NV[n], v, sampler) for n in range(6)])
            total_N += torch.where(from_support, p_N * kept_N, 0.0)
        torch.testing.assert_close(total_N, torch.zeros_like(total_N), rtol=0, atol=1e-12)


def inside(logits_V, v, sampler):
    """Whether the sampler can draw a token."""
    p_V = (logits_V / sampler.temperature).softmax(0)
    order = p_V.argsort(descending=True).tolist()[: sampler.top_k or V]
    mass = sum(p_V[u] for u in order)
    before = sum(p_V[u] for u in order[: order.index(v)]) / mass if v in order else 1.0
    return v in order and bool(before < sampler.top_p)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rollout": {"confidence": "maskgit_plus"}}, "an order of unmasking that ignores sampled tokens"),
        ({"rollout": {"defer_eos": True}}, "an order of unmasking that ignores sampled tokens"),
        ({"rollout": {"block_length": 1}}, "`rollout.block_cache: false`"),
        ({"guidance": {"kind": "entrgi"}}, "the policy's own rollouts"),
        ({"objective": {"trajectory_steps": 2}}, "`objective.trajectory_steps: 1`"),
        ({"objective": {"iterations": 2}}, "`objective.iterations: 1`"),
        ({"objective": {"estimator": "one_step"}}, "`objective.estimator: trajectory`"),
        ({"objective": {"advantage": "zscore"}}, "`objective.advantage: leave_one_out`"),
        ({"lora": {"dropout": 0.1}}, "`lora.dropout: 0`"),
        ({"reward": {"path": None, "functions": {"a:b": 1.0}}}, "a reward with a gradient"),
    ],
)
def test_what_would_make_it_biased_is_refused(section, message):
    config = Config(
        rollout=settings(),
        guidance=GuidanceConfig(kind="none"),
        objective=OBJECTIVE,
        reward=RewardConfig(path="reward"),
        lora=LoraConfig(),
    )
    assert resolve_algorithm(config).objective.on_trajectory
    changes = {name: dataclasses.replace(getattr(config, name), **values) for name, values in section.items()}
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")) as error:
        resolve_algorithm(dataclasses.replace(config, **changes))
    assert "\n" not in str(error.value)


def test_guided_rows_with_an_exact_correction_are_allowed():
    full = {"correction": "truncate", "correction_level": "sequence", "correction_max": float("inf")}
    config = Config(
        rollout=settings(),
        guidance=GuidanceConfig(kind="entrgi", support="policy"),
        objective=dataclasses.replace(OBJECTIVE, **full),
        reward=RewardConfig(path="reward"),
    )
    assert resolve_algorithm(config).needs >= {"row_gradients", "behaviour"}
