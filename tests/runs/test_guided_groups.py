"""Groups of guided and unguided completions, guidance that fades, and the metrics of what it did."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from training import adapter, go, resolved, untimed

from rgrl.config import GuidanceConfig
from rgrl.distributed import quantiles
from rgrl.metrics import Clock
from rgrl.rollout.guidance import guidance_at
from rgrl.setup import set_up
from rgrl.step import roll_out
from rgrl.trainer import sample


@pytest.fixture
def made(tiny, tmp_path):
    tiny["rollout"]["num_generations"] = 4
    return set_up(resolved(tiny, tmp_path), Accelerator())


def rolled(made, **guidance):
    config = dataclasses.replace(made.config, guidance=GuidanceConfig(kind="entrgi", **guidance))
    prompts = made.stream.prompts.take([0, 1]).repeat(4)
    return roll_out(dataclasses.replace(made, config=config), prompts, config.guidance, 3, "rollout", Clock())


def test_a_fraction_of_each_group_is_guided_and_the_rest_is_the_policys_own(made):
    guided, own, mixed = rolled(made).rollout, rolled(made, share=0.0).rollout, rolled(made, share=0.5).rollout
    assert not torch.equal(guided.behaviour_logp_BC, own.behaviour_logp_BC)
    for b in range(8):
        expected = guided if b % 4 < 2 else own
        for name, value in vars(mixed).items():
            torch.testing.assert_close(value[b], vars(expected)[name][b], msg=f"{name} of row {b}")
    assert torch.equal(own.behaviour_logp_BC, own.policy_logp_BC)


def test_texts_and_rewards_of_a_mixed_group_stay_with_their_rows(made):
    scored = rolled(made, share=0.25)
    assert scored.completions == made.policy.decode(scored.rollout.completion_BC)
    again = made.rewards.score(scored.prompts, scored.completions)
    torch.testing.assert_close(scored.reward.total_B, again.total_B)


def test_guidance_fades_linearly_and_is_off_at_its_end(tiny, tmp_path):
    tiny["guidance"] |= {"eta": 0.8, "eta_final": 0.0}
    tiny["run"] |= {"steps": 5, "eval_steps": 0}
    config = resolved(tiny, tmp_path)
    assert [guidance_at(config, step).eta for step in range(5)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert [guidance_at(config, step).kind for step in range(5)] == ["entrgi"] * 4 + ["none"]
    assert guidance_at(config, 9).kind == "none"
    config.guidance.eta_final = None
    assert guidance_at(config, 4).eta == 0.8
    lines = untimed(go(tiny, tmp_path))
    assert [line.get("guidance/eta") for line in lines] == pytest.approx([0.8, 0.6, 0.4, 0.2, None])
    assert "guidance/changed" in lines[0] and "guidance/changed" not in lines[4]


def test_samples_are_guided_alike_whatever_guidance_becomes_in_training(tiny, tmp_path):
    tiny["run"]["steps"] = 1
    samples = []
    for eta_final in (None, 0.0):
        tiny["guidance"]["eta_final"] = eta_final
        samples.append(list(sample(resolved(tiny, tmp_path))))
    assert samples[0] == samples[1] and len(samples[0]) > 4


def test_within_the_policys_own_support_nothing_is_outside_it(made):
    free, held = rolled(made, eta=3.0), rolled(made, eta=3.0, support="policy")
    assert free.metrics["guidance/outside_support"] > 0 == held.metrics["guidance/outside_support"]
    assert held.rollout.policy_logp_BC.isfinite().all() and held.metrics["guidance/delta_logp"] > 0.01


def test_the_correction_is_logged_and_reaches_the_update(tiny, tmp_path):
    adapters = []
    tiny["guidance"] |= {"support": "policy", "eta": 0.1}  # otherwise a few tokens make every ratio 0
    for kind in ("none", "truncate"):
        tiny["objective"] |= {"correction": kind, "correction_level": "sequence", "correction_max": 1.5}
        output = go(tiny, tmp_path, output_dir=kind, eval_steps=0)
        line = untimed(output)[0]
        assert line["correction/ess"] == 1 if kind == "none" else 0 < line["correction/ess"] < 1
        assert line["correction/mean"] == 1 if kind == "none" else 0 <= line["correction/mean"] <= 1.5
        assert line["correction/token/p05"] <= line["correction/token/p50"] <= line["correction/token/p95"]
        adapters.append(adapter(output, 2))
    assert adapters[0] != adapters[1]


def test_what_guidance_is_worth_is_measured_on_a_probe(tiny, tmp_path):
    tiny["guidance"] |= {"steps": 3, "eta": 1.0, "probe_prompts": 3}
    line = untimed(go(tiny, tmp_path, steps=1))[0]
    assert line["guidance/reward_before"] != line["guidance/reward_after"]
    tiny["guidance"] = {"kind": "none"}
    unguided = untimed(go(tiny, tmp_path, output_dir="unguided", steps=1))[0]
    assert not [key for key in unguided if key.startswith(("guidance/", "correction/"))]
    assert all(line[key] == value for key, value in unguided.items()), "the probe changes nothing else"


@pytest.mark.parametrize("estimator", ["elbo", "coupled", "quadrature", "sequence_elbo", "trajectory", "block_bounds"])
def test_every_estimator_trains(tiny, tmp_path, estimator):
    tiny["objective"] |= {"name": "spg" if estimator == "block_bounds" else "reinforce", "estimator": estimator}
    lines = untimed(go(tiny, tmp_path, eval_steps=0))
    assert lines[0]["kl"] == 0 and lines[1]["kl"] > 0
    assert all(line["grad_norm"] > 1e-3 and line["update/skipped"] == 0 for line in lines)


@pytest.mark.parametrize("n", [101, 2**24 + 1])  # torch sorts at most 2^24 values
def test_quantiles_by_hand(n):
    expected = {"x/p05": 0.05, "x/p50": 0.5, "x/p95": 0.95}
    assert quantiles(Accelerator(), "x", torch.linspace(0, 1, n)) == pytest.approx(expected, abs=1e-5)
