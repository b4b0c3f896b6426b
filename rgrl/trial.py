"""The dry run of user code: a custom advantage, estimator and objective, called once before a run begins."""

from dataclasses import replace

import torch

from rgrl.algo.advantages import in_groups
from rgrl.errors import ConfigError
from rgrl.plugins import describe_exception
from rgrl.rewards import RewardResult
from rgrl.seeds import global_state, set_global_state
from rgrl.setup import Run
from rgrl.step import Scored, objective_term, prepare
from rgrl.types import Rollout


def dry_run(run: Run) -> None:
    """Call a custom advantage, estimator and objective once, on dummy completions, before a run begins.

    Nothing is kept: no gradient, and the global random state is put back. Collective. Raises `ConfigError`.
    """
    state, G = global_state(), run.config.rollout.num_generations
    try:
        if "advantage" in run.algorithm.own and G > 1:
            in_groups(run.algorithm.advantage, torch.arange(2.0 * G), G, run.config.objective)
        if run.algorithm.own - {"advantage"}:
            one_batch = replace(run.config, run=replace(run.config.run, gradient_accumulation_steps=1))
            trial = replace(run, config=one_batch)
            objective_term(trial, prepare(trial, dummy_rollout(run), 0), 0, 0)
    except ConfigError as error:
        raise ConfigError(f"{error}; that was a trial on dummy completions") from error
    except Exception as error:  # a user's code may raise anything
        whose = " and ".join(getattr(error, "__notes__", [])) or f"the {' or the '.join(sorted(run.algorithm.own))}"
        raise ConfigError(f"{whose} failed in a trial on dummy completions: {describe_exception(error)}") from error
    finally:
        run.policy.eval()
        run.optimizer.zero_grad(set_to_none=True)
        set_global_state(state)


def dummy_rollout(run: Run) -> Scored:
    """Two completions of the first prompt as if sampled and scored, one of full length, of at most 8 tokens."""
    policy, rollout = run.policy, run.config.rollout
    C = min(rollout.max_completion_length, 8)
    prompts = run.stream.prompts.take([0, 0])
    prompt_BL, attention_BL = policy.encode(prompts.inputs)
    token_BC = torch.full(
        (2, C), next(i for i in range(policy.vocab_size) if i not in (policy.mask_id, *policy.end_ids))
    )
    token_BC[1, C // 2 :] = policy.end_ids[0]
    order_C, (mask_BC, logp_BC) = torch.arange(C), (torch.ones(2, C, dtype=torch.bool), torch.full((2, C), -1.0))
    mask_BC[1] = order_C <= C // 2
    step_BC = (order_C * min(rollout.steps, C) // C).repeat(2, 1)
    canvas_BL = torch.cat([prompt_BL.cpu(), token_BC], 1)
    shown_BL = torch.cat([attention_BL.cpu(), torch.ones(2, C, dtype=torch.bool)], 1)
    sampled = Rollout(
        canvas_BL=canvas_BL,
        attention_BL=shown_BL,
        completion_mask_BC=mask_BC,
        unmask_step_BC=step_BC,
        behaviour_logp_BC=logp_BC,
        policy_logp_BC=logp_BC.clone(),
    ).to(policy.device)
    return Scored(
        prompts=prompts,
        rollout=sampled,
        completions=policy.decode(sampled.completion_BC),
        reward=RewardResult(torch.tensor([1.0, 0.0]), {}),
        advantage_B=torch.tensor([1.0, -1.0], device=policy.device),
        metrics={},
    )
