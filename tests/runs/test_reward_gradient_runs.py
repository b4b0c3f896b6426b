"""Whole runs with the reward's gradient in the update: what they cost, resume, mix and refuse."""

import pytest
import torch
from accelerate import Accelerator
from launched_step import step
from training import adapter, assert_same_run, changed, go, resolved, untimed

from rgrl.errors import ConfigError
from rgrl.metrics import Clock
from rgrl.setup import set_up
from rgrl.step import gradient_term, objective_term, prepare, reduce_and_clip, rollout_step
from rgrl.trainer import train

TERM = {"weight": 1.0}


@pytest.fixture
def tiny(tiny) -> dict:
    """Without evaluations, which have nothing to do with it."""
    return changed(tiny, run={"eval_steps": 0})


@pytest.mark.parametrize(
    ("objective", "gradient", "passes"),
    [
        ({}, {}, 3),  # the reference and two updates
        ({"weight": 0.0}, TERM, 4),  # twice the reference and the policy
        ({"weight": 0.0}, {**TERM, "kl": 0.0}, 2),
        ({"beta": 0.0}, {**TERM, "kl": 0.0}, 4),
        ({"beta": 0.0}, {**TERM, "kl": 0.0, "draws": 3}, 8),
    ],
)
def test_what_is_turned_off_makes_no_forward_pass(tiny, tmp_path, objective, gradient, passes):
    config = changed(tiny, objective=objective, optim={"updates": 2}, gradient=gradient)
    _, told = step(resolved(config, tmp_path))
    assert told["calls"]["update"] == passes
    assert ("grad_norm/gradient" in told) == (len(gradient) > 0 and "weight" not in objective)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_unguided_rollouts_lay_out_no_embeddings_that_nobody_needs(tiny, tmp_path, weight):
    config = changed(tiny, guidance={"kind": "none"}, gradient={"weight": weight})
    run = set_up(resolved(config, tmp_path), Accelerator())
    assert run.guide_model is None and (run.rewards.model.embedding_VD is not None) == (weight > 0)
    calls = []
    run.rewards.model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = prepare(run, rollout_step(run, run.prompts(0), 0, Clock()), 0)
    assert (batch.guide is None) == (weight == 0)


def gradient_of(config: dict, tmp_path) -> torch.Tensor:
    """The term's gradient at the start of a run."""
    run = set_up(resolved(config, tmp_path), Accelerator())
    return gradient_term(run, prepare(run, rollout_step(run, run.prompts(0), 0, Clock()), 0), 0, 0).gradient


def test_of_a_mixed_reward_the_model_counts_with_its_weight(tiny, tmp_path):
    tiny = changed(tiny, gradient={"weight": 1.0, "kl": 0.0}, guidance={"kind": "none"})
    plain = gradient_of(tiny, tmp_path)
    mixed = changed(tiny, reward={"weight": -2.5, "functions": {"processes:die_at_call": 1.0}})
    torch.testing.assert_close(gradient_of(mixed, tmp_path), -2.5 * plain, rtol=1e-4, atol=1e-7)
    # The guide's has no weight, and need not be a part of the reward.
    of_guide = changed(tiny, guidance={"kind": "none", "path": tiny["reward"]["path"]}, gradient={"of": "guide"})
    of_guide["reward"] = {"functions": {"processes:die_at_call": 1.0}}
    torch.testing.assert_close(gradient_of(of_guide, tmp_path), plain, rtol=1e-4, atol=1e-7)
    assert plain.abs().max() > 1e-3


def test_both_terms_add_up_with_their_weights(tiny, tmp_path):
    tiny = changed(tiny, gradient={"weight": 0.7}, objective={"weight": 0.2}, optim={"max_grad_norm": 1e6})
    run = set_up(resolved(tiny, tmp_path), Accelerator())
    batch = prepare(run, rollout_step(run, run.prompts(0), 0, Clock()), 0)
    (drawn,) = batch.drawn
    objective, reward = objective_term(run, batch, 0, 0), gradient_term(run, batch, 0, 0)
    assert reward.totals["n"] == 4 and objective.totals["n"] == drawn.noise.count_BC.sum()
    parts = [0.2 * objective.gradient / drawn.noise.count_BC.sum(), 0.7 * reward.gradient / 4]
    metrics, norm = reduce_and_clip(run, {"objective": objective, "gradient": reward})
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in run.parameters]), sum(parts))
    assert norm == pytest.approx(sum(parts).norm().item())
    for name, part in zip(("objective", "gradient"), parts, strict=True):
        assert metrics[f"grad_norm/{name}"] == pytest.approx(part.norm().item()) and part.norm() > 1e-3
    losses = [term.totals["loss"] / term.totals["n"] for term in (objective, reward)]
    assert metrics["loss"] == pytest.approx((0.2 * losses[0] + 0.7 * losses[1]).item(), abs=1e-6)


SECTIONS = {
    "of the guide": {"gradient": {"of": "guide"}},
    "dmpo": {"objective": {"name": "dmpo", "advantage": "tilted"}},
    "gdsd": {"objective": {"name": "gdsd", "advantage": "centred"}},
    "tilt_matching": {"objective": {"name": "tilt_matching", "advantage": "tilted", "kl": "full"}},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_each_way_trains(tiny, tmp_path, name):
    term = {"gradient": {"weight": 1.0}} if "gradient" in SECTIONS[name] else {}
    tiny = changed(changed(tiny, optim={"updates": 2}, **term), **SECTIONS[name])
    lines = untimed(go(tiny, tmp_path))
    assert all(line["grad_norm"] > 1e-4 and line["update/skipped"] == 0 for line in lines)
    assert ("gradient/reward" in lines[0]) == bool(term)


def test_a_resumed_run_is_the_uninterrupted_one(tiny, tmp_path):
    tiny = changed(tiny, gradient={"weight": 1.0, "draws": 2}, lora={"dropout": 0.2})
    tiny = changed(tiny, optim={"updates": 2})
    whole = go(tiny, tmp_path, output_dir="whole", steps=4, eval_steps=2)
    broken = go(tiny, tmp_path, output_dir="broken", steps=2, eval_steps=2)
    again = go(tiny, tmp_path, output_dir="broken", steps=4, eval_steps=2, resume_from_checkpoint="latest")
    assert_same_run(again, whole, 4)
    assert broken == again and adapter(whole, 4) != adapter(whole, 3)
    lines = untimed(whole)[1:]
    assert lines[0]["gradient/kl"] < lines[3]["gradient/kl"], "the updates of a rollout move away from the base"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"weight": 0.0}}, "`objective.weight` and `gradient.weight` are both 0"),
        ({"gradient": TERM, "reward": {"weight": 0.0}}, "`gradient.weight: 1.0` needs a reward with a gradient"),
        ({"gradient": TERM | {"states": "early"}}, "`gradient.states` must be"),
    ],
)
def test_what_cannot_work_is_one_line(tiny, tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolved(changed(tiny, **sections), tmp_path)
    assert "\n" not in str(error.value)


def test_functions_alone_have_no_gradient(tiny, tmp_path):
    tiny = changed(tiny, gradient=TERM, guidance={"kind": "none"})
    tiny["reward"] = {"functions": {"processes:die_at_call": 1.0}}
    with pytest.raises(ConfigError, match=r"needs a reward with a gradient: set `reward.path`"):
        resolved(tiny, tmp_path)
    with pytest.raises(ConfigError, match=r"`gradient.of: guide` needs a model with a gradient"):
        resolved(changed(tiny, gradient={"of": "guide"}), tmp_path)


def test_one_completion_a_prompt_is_enough_for_the_rewards_gradient_alone(tiny, tmp_path):
    tiny = changed(tiny, rollout={"num_generations": 1}, gradient=TERM)
    with pytest.raises(ConfigError, match=r"`rollout.num_generations` must be at least 2"):
        train(resolved(tiny, tmp_path))
    output = go(changed(tiny, objective={"weight": 0.0}), tmp_path, output_dir="alone")
    assert all(line["grad_norm"] > 1e-3 for line in untimed(output))
