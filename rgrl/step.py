"""One RGRL step, readable top to bottom: `rollout_step`, then `update_step`.

Every process holds the frozen model, whole or its part (FSDP2), and the same adapter. It rolls out a part of the step's
prompts, and exchanges only adapter gradients, a handful of sums and, where it holds a part, the weights of the next
forward pass.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rgrl.algo.advantages import in_groups
from rgrl.algo.corrections import correction
from rgrl.algo.estimators import ValuesFn
from rgrl.algo.reward_gradient import draw_steps, reward_term
from rgrl.config import Config, GuidanceConfig
from rgrl.console import warn
from rgrl.distributed import fraction, global_rows, quantiles, reduce_sum, set_gradient
from rgrl.metrics import Clock, bridge_metrics, guidance_metrics, rollout_metrics
from rgrl.models.readout import read_out
from rgrl.rewards import RewardResult
from rgrl.rollout.denoise import DenoiseStats
from rgrl.rollout.generate import generate
from rgrl.rollout.guidance import Guidance, Guide, guidance_at
from rgrl.seeds import generators, row_keys
from rgrl.setup import Run
from rgrl.tracking.columns import data_columns, or_none, parts_of
from rgrl.types import LossInputs, LossTerm, NoiseDraw, Prompts, Rollout


# ------------------------------------------------------------------------------------------------------ rollout
@dataclass
class Scored:
    """A rollout with its text, its reward and its advantages."""

    prompts: Prompts  # B, each prompt G times
    rollout: Rollout
    completions: list[str]
    reward: RewardResult
    advantage_B: Tensor
    metrics: dict[str, float]
    guided_B: Tensor | None = None  # bool, which completions were steered; None: none


def rollout_step(run: Run, prompts: Prompts, step: int, clock: Clock) -> Scored:
    """Roll out G completions for each of this rank's prompts, score them, and compare them within groups."""
    prompts = prompts.repeat(run.config.rollout.num_generations)
    return roll_out(run, prompts, guidance_at(run.config, step), step, "rollout", clock)


def roll_out(run: Run, prompts: Prompts, settings: GuidanceConfig, step: int, purpose: str, clock: Clock) -> Scored:
    """One scored completion for each of B prompts, groups of G standing together. `step` and `purpose` seed the noise.

    The first completions of each group are guided, as many as `guidance.share` allows; the others are unguided.
    """
    config, policy, accelerator = run.config, run.policy, run.accelerator
    B, G, stats = len(prompts), config.rollout.num_generations, DenoiseStats()
    with clock.phase("rollout"):
        guidance = guidance_of(run, settings)
        guided_B = torch.arange(B) % G < (round(settings.share * G) if guidance is not None else 0)
        seeds = generators(config.run.seed, step, global_rows(accelerator, B), purpose)
        with policy.forward_passes():
            rollout = generate(policy, prompts, config.rollout, seeds, guidance, guided_B, stats)
    with clock.phase("reward"):
        completions = policy.decode(rollout.completion_BC)
        reward = run.rewards.score(prompts, completions)
        compared_B = run.rewards.for_advantages(reward, G)
        advantage_B = in_groups(run.algorithm.advantage, compared_B, G, config.objective)
    metrics = rollout_metrics(accelerator, rollout, policy.is_end, reward.total_B, reward.terms, G)
    metrics["entropy"] = fraction(accelerator, stats.entropy, stats.committed)
    if guided_B.any():
        metrics |= guidance_metrics(accelerator, config, rollout, stats)
        metrics["guidance/eta"] = settings.eta
        metrics["guidance/retokenised"] = retokenised(run, prompts, rollout, completions)
        if metrics["guidance/broken"] > 0 and accelerator.is_main_process:
            warn(f"{metrics['guidance/broken']:.0f} gradients of guidance were not finite and steered nothing")
    if run.coverage is not None and (guided_B.any() or run.gradient_model is not None):
        metrics |= bridge_metrics(accelerator, rollout, policy.is_end, run.coverage)
    return Scored(
        prompts=prompts,
        rollout=rollout,
        completions=completions,
        reward=reward,
        advantage_B=advantage_B.to(policy.device),
        metrics=metrics,
        guided_B=guided_B,
    )


def guidance_of(run: Run, settings: GuidanceConfig) -> Guidance | None:
    """What steers rollouts under these settings; None if nothing does."""
    if settings.kind == "none" or run.guide_model is None:
        return None
    return run.guide_model.guidance(settings, run.config.reward.attend_eos)


def retokenised(run: Run, prompts: Prompts, rollout: Rollout, completions: list[str]) -> float:
    """The fraction of completions, over all ranks, of which guidance was shown other tokens than scoring reads."""
    assert run.guide_model is not None
    ended_BC = run.policy.is_end(rollout.completion_BC).cumsum(1) > 0
    tokens = [ids[~ended].tolist() for ids, ended in zip(rollout.completion_BC, ended_BC, strict=True)]
    differs_B = torch.tensor(run.guide_model.retokenised(prompts, tokens, completions), device=run.policy.device)
    return fraction(run.accelerator, [differs_B.sum()], [torch.tensor(len(differs_B), device=run.policy.device)])


def completion_rows(scored: Scored, prompt: str) -> list[dict]:
    """This rank's completions as rows of a table, with the parts of their reward and the columns of the data.

    A completion without a reward has None there. `prompt` is the data's column with the prompt.
    """
    B = len(scored.completions)
    guided = scored.guided_B.tolist() if scored.guided_B is not None else [False] * B
    reward = or_none(scored.reward.total_B)
    columns = scored.prompts.texts, scored.completions, guided, reward, scored.advantage_B.tolist()
    names = ("prompt", "completion", "guided", "reward", "advantage")
    ours = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    parts = parts_of(scored.reward.terms) if scored.reward.terms else [{}] * B
    prompts = zip(scored.prompts.rows, scored.prompts.texts, strict=True)
    data = [data_columns(row, prompt, text) for row, text in prompts]
    return [row | part | more for row, part, more in zip(ours, parts, data, strict=True)]


# ------------------------------------------------------------------------------------------------------- update
@dataclass(frozen=True)
class Update:
    """What an update step leaves behind: metrics of the last update, and what was skipped."""

    metrics: dict[str, float]
    skipped_in_a_row: int
    skipped: list[dict[str, Any]]  # what this rank made each skipped update from, for `torch.save`


def update_step(run: Run, scored: Scored, step: int, skipped_in_a_row: int, clock: Clock) -> Update:
    """Update the adapter `optim.updates` times on one rollout.

    The gradient is a weighted sum of two terms: the objective's, and the reward's own. A term of weight 0 is left out.
    """
    config, optimizer = run.config, run.optimizer
    metrics: dict[str, float] = {"update/skipped": 0.0}
    skipped: list[dict[str, Any]] = []
    with clock.phase("update"):
        batch = prepare(run, scored, step)
        for update in range(config.optim.updates):
            terms = {}
            if config.objective.weight > 0:
                terms["objective"] = objective_term(run, batch, step, update)
            if config.gradient.weight > 0:
                terms["gradient"] = gradient_term(run, batch, step, update)
            found, norm = reduce_and_clip(run, terms)
            rate = learning_rate(config, step * config.optim.updates + update)
            if math.isfinite(norm + found["loss"]):
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                skipped_in_a_row = 0
            else:
                metrics["update/skipped"] += 1
                skipped_in_a_row += 1
                skipped.append(diagnosis(scored, batch, update, {"grad_norm": norm, **found}))
            optimizer.zero_grad(set_to_none=True)
            metrics |= found | {"learning_rate": rate, "grad_norm": norm}
            metrics["grad_norm_clipped"] = min(norm, config.optim.max_grad_norm)
            for name, values in ((name, v) for term in terms.values() for name, v in term.samples.items()):
                metrics |= quantiles(run.accelerator, name, torch.cat(values))
    return Update(metrics, skipped_in_a_row, skipped)


def reduce_and_clip(run: Run, terms: dict[str, LossTerm]) -> tuple[dict[str, float], float]:
    """Sum each term over ranks, divide it by its global denominator, add the terms by their weights, and clip.

    Sets the parameters' gradients. Returns metrics, and the gradient's norm before clipping.
    """
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
    set_gradient(run.parameters, whole)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.config.optim.max_grad_norm)
    return metrics | {"loss": loss}, float(norm)


def learning_rate(config: Config, update: int) -> float:
    """The rate of an update, counted from 0 over the whole run: linear warm-up, then the schedule down to 0.

    A function of the update's number, so that resuming needs no schedule state.
    """
    o, updates = config.optim, config.run.steps * config.optim.updates
    if update < o.warmup_steps:
        return o.learning_rate * (update + 1) / o.warmup_steps
    done = (update - o.warmup_steps) / max(1, updates - o.warmup_steps)
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return o.learning_rate * factors[o.schedule]


# ------------------------------------------------------------------------------------------ what updates share
@dataclass
class Drawn:
    """Canvases that the objective reads, and what is known there. Lists have an entry for each micro-batch."""

    noise: NoiseDraw
    old: list[Tensor | None]  # log-probabilities (BC) before the first update
    reference: list[Tensor | None]  # log-probabilities (BC) of the frozen base; None: not needed
    reference_states: list[list[Tensor]]  # its final hidden states (NH), by canvas; empty: not needed
    old_states: list[list[Tensor]]  # the same of the policy before the first update


@dataclass
class Batch:
    """What all updates on one rollout share. Lists have an entry for each micro-batch; None or empty: not needed."""

    scored: Scored
    micro: list[slice]
    drawn: list[Drawn] = field(default_factory=list)  # one for all updates, or with `objective.redraw` one for each
    correction_BC: Tensor | None = None
    guide: Guide | None = None  # the reward whose gradient is a term of the update
    step_UKB: Tensor | None = None  # the denoising steps of that term, for each update


def prepare(run: Run, scored: Scored, step: int) -> Batch:
    """Draw the noise, weigh the tokens, and evaluate the reference: once for all updates on this rollout."""
    config, needs, rollout = run.config, run.algorithm.needs, scored.rollout
    B = len(rollout.canvas_BL)
    size = B // config.run.gradient_accumulation_steps
    batch = Batch(scored, [slice(i, i + size) for i in range(0, B, size)])
    if run.gradient_model is not None:
        guidance = run.gradient_model.guidance(config.guidance, config.reward.attend_eos)
        batch.guide = guidance.guide(scored.prompts)
        seeds = generators(config.run.seed, step, global_rows(run.accelerator, B), "states")
        batch.step_UKB = draw_steps(rollout, config.gradient, config.rollout, seeds, config.optim.updates)
    if config.objective.weight == 0:
        return batch
    batch.correction_BC = correction(rollout, config.objective) if "behaviour" in needs else None
    for update in range(config.optim.updates if config.objective.redraw else 1):
        batch.drawn.append(draw(run, batch, step, update))
    return batch


def dropout_keys(run: Run, batch: Batch, step: int, purpose: str) -> Tensor:
    """key_B of this rank's rows, for LoRA dropout."""
    rows = global_rows(run.accelerator, len(batch.scored.advantage_B))
    return row_keys(run.config.run.seed, step, rows, purpose)


def draw(run: Run, batch: Batch, step: int, update: int) -> Drawn:
    """The noise of an update and the reference there. From the second update on, the policy as it is before the first
    is evaluated too, with the dropout of that update: before anything has moved, all ratios are 1."""
    needs, micro = run.algorithm.needs, len(batch.micro)
    rows = global_rows(run.accelerator, len(batch.scored.advantage_B))
    seeds = generators(run.config.run.seed, step, rows, f"noise {update}" if update else "noise")
    noise = run.algorithm.estimator.draw(batch.scored.rollout, run.config.objective, seeds)
    states: list[list[list[Tensor]]] = [[[] for _ in range(micro)] for _ in range(2)]
    drawn = Drawn(noise, [None] * micro, [None] * micro, *states)
    if {"ref", "reference_states"} & needs:
        with torch.no_grad(), run.policy.forward_passes(), run.policy.reference():
            for m, kept in enumerate(drawn.reference_states):
                values = values_before(run, kept, logp="ref" in needs, keep="reference_states" in needs)
                drawn.reference[m] = estimate(run, batch, drawn, m, values)["logp"]
    if update > 0 and {"old", "old_states"} & needs:
        key_B = dropout_keys(run, batch, step, f"dropout {update}")
        run.policy.train()
        for m, kept in enumerate(drawn.old_states):
            with torch.no_grad(), run.policy.forward_passes(key_B[batch.micro[m]]):
                values = values_before(run, kept, logp="old" in needs, keep="old_states" in needs)
                found = estimate(run, batch, drawn, m, values)["logp"]
            drawn.old[m] = found if "old" in needs else None
        run.policy.eval()
    return drawn


def diagnosis(scored: Scored, batch: Batch, update: int, totals: dict[str, float]) -> dict[str, Any]:
    """What this rank made a skipped update from."""
    drawn = batch.drawn[update if len(batch.drawn) > 1 else 0] if batch.drawn else None
    return {
        "totals": totals,
        "prompts": scored.prompts.texts,
        "completions": scored.completions,
        "reward_B": scored.reward.total_B,
        "advantage_B": scored.advantage_B,
        "rollout": vars(scored.rollout),
        "noise": vars(drawn.noise) if drawn is not None else None,
        "states": batch.step_UKB,
    }


# ------------------------------------------------------------------------------------------------- the two terms
def objective_term(run: Run, batch: Batch, step: int, update: int) -> LossTerm:
    """The objective: one forward and backward pass over each micro-batch."""
    config, policy, algorithm, scored = run.config, run.policy, run.algorithm, batch.scored
    term = LossTerm(config.objective.weight)
    drawn = batch.drawn[update if config.objective.redraw else 0]
    key_B = dropout_keys(run, batch, step, f"dropout {update}")
    policy.train()  # gradient checkpointing and LoRA dropout are off otherwise
    for m, rows in enumerate(batch.micro):
        with policy.forward_passes(key_B[rows]):
            values = estimate(run, batch, drawn, m, trained_values(run, drawn, m))
        if "old" in algorithm.needs and update == 0:  # nothing has moved yet, so these are the old ones
            drawn.old[m] = values["logp"].detach()
        inputs = LossInputs(
            logp_BC=values["logp"],
            mask_BC=drawn.noise.count_BC[rows],
            advantage_B=scored.advantage_B[rows],
            by_sequence=algorithm.estimator.level == "sequence",
            old_logp_BC=drawn.old[m],
            ref_logp_BC=drawn.reference[m] if "ref" in algorithm.needs else None,
            correction_BC=batch.correction_BC[rows] if batch.correction_BC is not None else None,
            readouts={name: value for name, value in values.items() if name != "logp"},
        )
        out = algorithm.objective.loss(inputs, config.objective)
        policy.backward(out.loss_sum)
        term.add({"loss": out.loss_sum, "n": out.denominator, **out.metrics})
        for name, value in out.samples.items():
            term.samples.setdefault(name, []).append(value)
    policy.eval()
    term.take_gradient(run.parameters)
    return term


def estimate(run: Run, batch: Batch, drawn: Drawn, m: int, values: ValuesFn) -> dict[str, Tensor]:
    """The estimator's values (BC...) of micro-batch m, by name."""
    rows = batch.micro[m]
    rollout, noise = batch.scored.rollout.rows(rows), drawn.noise.rows(rows)
    estimator, mask_id = run.algorithm.estimator, run.policy.mask_id
    advantage_B = batch.scored.advantage_B[rows]
    return estimator.estimate(values, rollout, noise, mask_id, run.config.objective, advantage_B)


def values_before(run: Run, states: list[Tensor], *, logp: bool, keep: bool) -> ValuesFn:
    """Log-probabilities on each canvas before any update, if `logp`; its final hidden states go into `states`, if
    `keep`, for readouts that compare with them."""

    def values(k: int, canvas_BL: Tensor, attention_BL: Tensor, at_BL: Tensor, token_N: Tensor) -> dict[str, Tensor]:
        states_NH = run.policy.states(canvas_BL, attention_BL)[at_BL]
        if keep:
            states.append(states_NH)
        if not logp:
            return {"logp": torch.zeros(len(token_N), device=token_N.device)}  # nobody asks for them
        readouts, vocab_size = {"logp": run.readouts["logp"]}, run.policy.vocab_size
        return read_out(run.policy.project, states_NH, token_N, readouts, vocab_size=vocab_size)

    return values


def trained_values(run: Run, drawn: Drawn, m: int) -> ValuesFn:
    """All readouts on each canvas of micro-batch m, with gradient."""
    reference, old = drawn.reference_states[m], drawn.old_states[m]

    def values(k: int, canvas_BL: Tensor, attention_BL: Tensor, at_BL: Tensor, token_N: Tensor) -> dict[str, Tensor]:
        states_NH = run.policy.states(canvas_BL, attention_BL)[at_BL]
        given = {"reference_NH": reference[k]} if reference else {}
        if "old_states" in run.algorithm.needs:
            if len(old) == k:  # nothing has moved yet, so these are the old ones
                old.append(states_NH.detach())
            given["old_NH"] = old[k]
        vocab_size = run.policy.vocab_size
        return read_out(run.policy.project, states_NH, token_N, run.readouts, given, vocab_size=vocab_size)

    return values


def gradient_term(run: Run, batch: Batch, step: int, update: int) -> LossTerm:
    """The reward's own gradient, at the states that were drawn for this update."""
    config = run.config
    assert batch.guide is not None and batch.step_UKB is not None
    return reward_term(
        run.policy,
        batch.guide,
        batch.scored.rollout,
        step_KB=batch.step_UKB[update],
        micro_batches=batch.micro,
        dropout_key_B=dropout_keys(run, batch, step, f"gradient dropout {update}"),
        parameters=run.parameters,
        config=config,
        reward_weight=config.reward.weight if config.gradient.of == "reward" else 1.0,
    )
