"""`objective.redraw`: each update has canvases of its own, and on them the policy of before the first update."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from training import adapter, assert_same_run, changed, go, resolved

from rgrl.metrics import Clock
from rgrl.setup import set_up
from rgrl.step import objective_term, prepare, rollout_step


def updates(tiny, tmp_path, move: float, **objective) -> list:
    """What the objective is given at each of three updates, all parameters moved by `move` after each."""
    settings = {"name": "grpo", "beta": 0.1, **objective}
    tiny = changed(
        tiny,
        objective=settings,
        optim={"updates": 3},
        lora={"dropout": 0.3},
        run={"gradient_accumulation_steps": 2, "eval_steps": 0},
    )
    run = set_up(resolved(tiny, tmp_path), Accelerator(cpu=True))
    seen, loss = [], run.algorithm.objective.loss

    def watched(inputs, config):
        seen.append(inputs)
        return loss(inputs, config)

    objective = replace(run.algorithm.objective, loss=watched)
    run = replace(run, algorithm=replace(run.algorithm, objective=objective))
    scored = rollout_step(run, run.prompts(0), 0, Clock())
    batch = prepare(run, scored, 0)
    for iteration in range(3):
        objective_term(run, batch, 0, iteration)
        with torch.no_grad():
            for group in run.optimizer.param_groups:
                for p in group["params"]:
                    p.add_(move)
    return seen


def test_before_anything_has_moved_all_ratios_are_one(tiny, tmp_path):
    """Also with LoRA dropout: the log-probabilities of before have the dropout of their update."""
    seen = updates(tiny, tmp_path, 0.0, redraw=True)
    assert len(seen) == 6  # two micro-batches each
    for inputs in seen:
        assert torch.equal(inputs.logp_BC.detach()[inputs.mask_BC > 0], inputs.old_logp_BC[inputs.mask_BC > 0])
    with_noise = [inputs.ref_logp_BC for inputs in seen[::2]]
    assert not torch.equal(with_noise[0], with_noise[1]) and not torch.equal(with_noise[1], with_noise[2])
    shared = [inputs.ref_logp_BC for inputs in updates(tiny, tmp_path, 0.0)[::2]]
    assert torch.equal(shared[0], with_noise[0]) and torch.equal(shared[0], shared[1])


def test_the_policy_of_before_is_that_of_before_the_first_update(tiny, tmp_path):
    still, moved = (updates(tiny, tmp_path, move, redraw=True) for move in (0.0, 0.02))
    for a, b in zip(still, moved, strict=True):
        assert torch.equal(a.old_logp_BC, b.old_logp_BC) and torch.equal(a.ref_logp_BC, b.ref_logp_BC)
    assert not torch.equal(moved[2].logp_BC, moved[2].old_logp_BC)


def test_one_update_is_the_same_either_way_and_several_are_not(tiny, tmp_path):
    tiny = changed(tiny, objective={"name": "grpo"}, run={"steps": 1, "eval_steps": 0})
    outs = [
        go(changed(tiny, objective={"redraw": redraw}, optim={"updates": n}), tmp_path, output_dir=f"{redraw}{n}")
        for redraw in (False, True)
        for n in (1, 2)
    ]
    assert_same_run(outs[0], outs[2], 1)
    assert adapter(outs[1], 1) != adapter(outs[3], 1)


@pytest.mark.parametrize("name", ["gdsd", "tilt_matching", "dmpo"])
def test_other_objectives_redraw_too(tiny, tmp_path, name):
    advantage = {"tilt_matching": "tilted", "dmpo": "tilted"}.get(name, "zscore")
    settings = {"name": name, "advantage": advantage, "redraw": True}
    out = go(changed(tiny, objective=settings, optim={"updates": 2}, run={"steps": 1, "eval_steps": 0}), tmp_path)
    assert (out / "checkpoints" / "step_000001").is_dir()
