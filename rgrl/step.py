"""One RGRL step, readable top to bottom: `rollout_step`, then `update_step`.

Every process holds the frozen model, whole or its part (FSDP2), and the same adapter. It rolls out its own prompts, and
exchanges only adapter gradients, a handful of sums and, where it holds a part, the weights of the next forward pass.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from rgrl.algo.advantages import in_groups
from rgrl.algo.learning_rate import learning_rate
from rgrl.config import GuidanceConfig
from rgrl.console import warn
from rgrl.folder import new_owner
from rgrl.models.lora import adapter_parameters
from rgrl.rollout.denoise import DenoiseStats
from rgrl.rollout.generate import generate
from rgrl.rollout.guidance import guidance_at
from rgrl.runtime.clock import Clock
from rgrl.runtime.collectives import fraction, global_rows, quantiles, reduce_sum, set_gradient
from rgrl.runtime.metrics import bridge_metrics, guidance_metrics, rollout_metrics
from rgrl.runtime.skipped import keep_batch
from rgrl.seeds import generators
from rgrl.setup import Run
from rgrl.terms import Batch, Scored, Term, objective_gradient, prepare, reward_term_gradient, what_came_true
from rgrl.tracking.columns import data_columns, or_none, parts_of
from rgrl.types import Prompts, Rollout


# ------------------------------------------------------------------------------------------------------ rollout
def rollout_step(run: Run, step: int, clock: Clock) -> Scored:
    """Roll out G completions for each of this rank's prompts, score them, and compare them within groups."""
    prompts = run.stream.batch(step, run.accelerator.process_index)
    prompts = prompts.repeat(run.config.rollout.num_generations)
    return roll_out(run, prompts, guidance_at(run.config, step), step, "rollout", clock)


def roll_out(run: Run, prompts: Prompts, settings: GuidanceConfig, step: int, purpose: str, clock: Clock) -> Scored:
    """One scored completion for each of B prompts, groups of G standing together. `step` and `purpose` seed the noise.

    The first completions of each group are guided, as many as `guidance.share` says; the others are the policy's own.
    """
    config, policy, accelerator = run.config, run.policy, run.accelerator
    B, G, stats = len(prompts), config.rollout.num_generations, DenoiseStats()
    with clock.phase("rollout"):
        guidance = run.guidance(settings)
        guided_B = torch.arange(B) % G < (round(settings.share * G) if guidance is not None else 0)
        seeds = generators(config.run.seed, step, global_rows(accelerator, B), purpose)
        with policy.forward_passes():
            rollout = generate(policy, prompts, config.rollout, seeds, guidance, guided_B, stats)
    with clock.phase("reward"):
        completions = policy.decode(rollout.completion_BC)
        reward_B, terms = run.rewards.score(prompts, completions)
        compared_B = run.rewards.for_advantages(reward_B, terms, G)
        advantage_B = in_groups(run.algorithm.advantage, compared_B, G, config.objective)
    metrics = rollout_metrics(accelerator, rollout, policy.is_end, reward_B, terms, G)
    metrics["entropy"] = fraction(accelerator, stats.entropy, stats.committed)
    if guided_B.any():
        metrics |= guidance_metrics(accelerator, config, rollout, stats)
        metrics["guidance/eta"] = settings.eta
        metrics["guidance/retokenised"] = retokenised(run, prompts, rollout, completions)
        if metrics["guidance/broken"] > 0 and accelerator.is_main_process:
            warn(f"{metrics['guidance/broken']:.0f} gradients of guidance were not finite and steered nothing")
    if run.coverage is not None and (guided_B.any() or run.gradient_model is not None):
        metrics |= bridge_metrics(accelerator, rollout, policy.is_end, run.coverage)
    scored = prompts, rollout, completions, reward_B, terms, advantage_B.to(policy.device), metrics
    return Scored(*scored, guided_B)


def retokenised(run: Run, prompts: Prompts, rollout: Rollout, completions: list[str]) -> float:
    """The fraction of completions, over all ranks, of which guidance was shown other tokens than scoring reads."""
    assert run.guide_model is not None
    ended_BC = run.policy.is_end(rollout.completion_BC).cumsum(1) > 0
    tokens = [ids[~ended].tolist() for ids, ended in zip(rollout.completion_BC, ended_BC, strict=True)]
    told_B = torch.tensor(run.guide_model.retokenised(prompts, tokens, completions), device=run.policy.device)
    return fraction(run.accelerator, [told_B.sum()], [torch.tensor(len(told_B), device=run.policy.device)])


# ------------------------------------------------------------------------------------------------------- update
@dataclass(frozen=True)
class Update:
    """What an update step leaves behind: metrics of the last update, and how many updates in a row were skipped."""

    metrics: dict[str, float]
    skipped_in_a_row: int


def update_step(run: Run, scored: Scored, step: int, skipped_in_a_row: int, clock: Clock) -> Update:
    """Update the adapter `objective.iterations` times on one rollout.

    The gradient is a weighted sum of two: the objective's, and the reward's own. What has weight 0 is left out.
    """
    config, optimizer = run.config, run.optimizer
    metrics: dict[str, float] = {"update/skipped": 0.0}
    with clock.phase("update"):
        batch = prepare(run, scored, step)
        for iteration in range(config.objective.iterations):
            terms = {}
            if config.objective.weight > 0:
                terms["objective"] = objective_gradient(run, batch, step, iteration)
            if config.gradient.weight > 0:
                terms["gradient"] = reward_term_gradient(run, batch, step, iteration)
            found, norm = reduce_and_clip(run, terms)
            rate = learning_rate(config, step * config.objective.iterations + iteration)
            if math.isfinite(norm + found["loss"]):
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                skipped_in_a_row = 0
            else:
                metrics["update/skipped"] += 1
                skipped_in_a_row += 1
                keep_skipped(run, scored, batch, (step, iteration), {"grad_norm": norm, **found})
            optimizer.zero_grad(set_to_none=True)
            metrics |= found | {"learning_rate": rate, "grad_norm": norm}
            metrics["grad_norm_clipped"] = min(norm, config.optim.max_grad_norm)
            for name, values in ((name, v) for term in terms.values() for name, v in term.samples.items()):
                metrics |= quantiles(run.accelerator, name, torch.cat(values))
        if batch.measured:
            metrics |= what_came_true(run, batch)
    return Update(metrics, skipped_in_a_row)


def reduce_and_clip(run: Run, terms: dict[str, Term]) -> tuple[dict[str, float], float]:
    """Sum each term over ranks, divide it by its global denominator, add up what they weigh, and clip.

    Sets the parameters' gradients. Returns metrics, and the gradient's norm before clipping.
    """
    parameters = list(adapter_parameters(run.policy).values())
    metrics: dict[str, float] = {}
    whole, loss = torch.zeros(()), 0.0
    for name, term in terms.items():
        totals = dict(
            zip(term.totals, reduce_sum(run.accelerator, torch.stack(list(term.totals.values()))), strict=True)
        )
        counts = {"n", *term.over.values()}
        per = {what: totals[term.over.get(what, "n")].clamp(min=1.0) for what in totals}
        metrics |= {what: float(total / per[what]) for what, total in totals.items() if what not in counts}
        loss += term.weight * metrics["loss"]
        gradient = reduce_sum(run.accelerator, term.gradient).div_(totals["n"].clamp(min=1.0)).mul_(term.weight)
        whole = whole + gradient if whole.ndim else gradient
        if len(terms) > 1:
            metrics[f"grad_norm/{name}"] = float(gradient.norm())
    set_gradient(parameters, whole)
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.optim.max_grad_norm)
    return metrics | {"loss": loss}, float(norm)


def keep_skipped(run: Run, scored: Scored, batch: Batch, place: tuple[int, int], totals: dict[str, float]) -> None:
    """Write what this rank made a skipped update from. `place`: its step, and which of the rollout's updates it is."""
    step, iteration = place
    drawn = batch.drawn[iteration if run.config.objective.redraw else 0] if batch.drawn else None
    kept = {
        "totals": totals,
        "prompts": scored.prompts.texts,
        "completions": scored.completions,
        "reward_B": scored.reward_B,
        "advantage_B": scored.advantage_B,
        "rollout": vars(scored.rollout),
        "noise": vars(drawn.noise) if drawn is not None else None,
        "states": batch.step_UKB,
    }
    output, rank = Path(run.config.run.output_dir), run.accelerator.process_index
    keep_batch(output, run.owner or new_owner(), rank, step, run.config.run.max_skipped, kept)


def completion_rows(scored: Scored, prompt: str) -> list[dict]:
    """This rank's completions as rows of a table, with the parts of their reward and the columns of the data.

    A completion without a reward has None there. `prompt` is the data's column with the prompt.
    """
    B = len(scored.completions)
    guided = scored.guided_B.tolist() if scored.guided_B is not None else [False] * B
    columns = scored.prompts.texts, scored.completions, guided, or_none(scored.reward_B), scored.advantage_B.tolist()
    names = ("prompt", "completion", "guided", "reward", "advantage")
    own = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    parts = parts_of(scored.terms) if scored.terms else [{}] * B
    prompts = zip(scored.prompts.rows, scored.prompts.texts, strict=True)
    data = [data_columns(row, prompt, text) for row, text in prompts]
    return [row | part | more for row, part, more in zip(own, parts, data, strict=True)]
