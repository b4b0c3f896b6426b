"""One RGRL step, readable top to bottom: `rollout_step`, then `update_step`.

Every process holds the frozen model, whole or its part (FSDP2), and the same adapter. It rolls out its own prompts, and
exchanges only adapter gradients, a handful of sums and, where it holds a part, the weights of the next forward pass.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rgrl.algo.corrections import correction
from rgrl.algo.estimators import ValuesFn
from rgrl.algo.learning_rate import learning_rate
from rgrl.config import GuidanceConfig
from rgrl.console import warn
from rgrl.models.lora import adapter_parameters
from rgrl.models.readout import read_out
from rgrl.rollout.denoise import DenoiseStats
from rgrl.rollout.generate import generate
from rgrl.rollout.guidance import guidance_at
from rgrl.runtime.clock import Clock
from rgrl.runtime.collectives import fraction, global_rows, quantiles, reduce_sum, sum_gradients
from rgrl.runtime.metrics import bridge_metrics, guidance_metrics, rollout_metrics
from rgrl.runtime.skipped import keep_batch
from rgrl.seeds import generators, row_keys
from rgrl.setup import Run
from rgrl.types import LossInputs, NoiseDraw, Prompts, Rollout


@dataclass
class Scored:
    """A rollout with its text, its reward and its advantages."""

    prompts: Prompts  # B, each prompt G times
    rollout: Rollout
    completions: list[str]
    reward_B: Tensor
    terms: dict[str, Tensor]  # r_B of each term of the reward, unweighted
    advantage_B: Tensor
    metrics: dict[str, float]


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
        advantage_B = torch.zeros_like(reward_B)
        if G > 1:
            advantage_B = run.algorithm.advantage(reward_B, G, config.objective)
    metrics = rollout_metrics(accelerator, rollout, policy.is_end, reward_B, terms, G)
    metrics["entropy"] = fraction(accelerator, stats.entropy, stats.committed)
    if guided_B.any():
        metrics |= guidance_metrics(accelerator, config, rollout, stats)
        metrics["guidance/eta"] = settings.eta
        metrics["guidance/retokenised"] = retokenised(run, prompts, rollout, completions)
        if run.coverage is not None:
            metrics |= bridge_metrics(accelerator, rollout, policy.is_end, run.coverage)
        if metrics["guidance/broken"] > 0 and accelerator.is_main_process:
            warn(f"{metrics['guidance/broken']:.0f} gradients of guidance were not finite and steered nothing")
    return Scored(prompts, rollout, completions, reward_B, terms, advantage_B.to(policy.device), metrics)


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
    """Update the adapter `objective.iterations` times on one rollout."""
    metrics: dict[str, float] = {"update/skipped": 0.0}
    with clock.phase("update"):
        batch = prepare(run, scored, step)
        for iteration in range(run.config.objective.iterations):
            sums = accumulate_gradients(run, batch, step, iteration)
            totals, count, norm = reduce_and_clip(run, sums)
            rate = learning_rate(run.config, step * run.config.objective.iterations + iteration)
            if bool((norm + totals["loss"]).isfinite()):
                for group in run.optimizer.param_groups:
                    group["lr"] = rate
                run.optimizer.step()
                skipped_in_a_row = 0
            else:
                metrics["update/skipped"] += 1
                skipped_in_a_row += 1
                keep_skipped(run, scored, batch, step, {"grad_norm": norm, **totals})
            run.optimizer.zero_grad(set_to_none=True)
            metrics |= {name: float(total / count) for name, total in totals.items()}
            metrics |= {"learning_rate": rate, "grad_norm": float(norm)}
            metrics["grad_norm_clipped"] = min(float(norm), run.config.optim.max_grad_norm)
            for name, values in sums.samples.items():
                metrics |= quantiles(run.accelerator, name, torch.cat(values))
    return Update(metrics, skipped_in_a_row)


@dataclass
class Batch:
    """What all updates on one rollout share. Lists have an entry for each micro-batch; None or empty: not needed."""

    rollout: Rollout
    advantage_B: Tensor
    noise: NoiseDraw
    correction_BC: Tensor | None
    micro: list[slice]
    old: list[Tensor | None]  # log-probabilities (BC) before the first update
    reference: list[Tensor | None]  # log-probabilities (BC) of the frozen base
    reference_states: list[list[Tensor]]  # its final hidden states (NH), by canvas


def prepare(run: Run, scored: Scored, step: int) -> Batch:
    """Draw the noise, weigh the tokens, and evaluate the reference: once for all updates on this rollout."""
    config, needs, B = run.config, run.algorithm.needs, len(scored.rollout.canvas_BL)
    size = B // config.run.gradient_accumulation_steps
    seeds = generators(config.run.seed, step, global_rows(run.accelerator, B), "noise")
    micro = [slice(i, i + size) for i in range(0, B, size)]
    batch = Batch(
        rollout=scored.rollout,
        advantage_B=scored.advantage_B,
        noise=run.algorithm.estimator.draw(scored.rollout, config.objective, seeds),
        correction_BC=correction(scored.rollout, config.objective) if "behaviour" in needs else None,
        micro=micro,
        old=[None] * len(micro),
        reference=[None] * len(micro),
        reference_states=[[] for _ in micro],
    )
    if {"ref", "reference_states"} & needs:
        with torch.no_grad(), run.policy.forward_passes(), run.policy.reference():
            for m, states in enumerate(batch.reference_states):
                batch.reference[m] = estimate(run, batch, m, reference_values(run, states))["logp"]
    return batch


def reference_values(run: Run, states: list[Tensor]) -> ValuesFn:
    """Log-probabilities on each canvas; its final hidden states go into `states` if a readout needs them."""

    def values(k: int, canvas_BL: Tensor, attention_BL: Tensor, at_BL: Tensor, token_N: Tensor) -> dict[str, Tensor]:
        states_NH = run.policy.states(canvas_BL, attention_BL)[at_BL]
        if "reference_states" in run.algorithm.needs:
            states.append(states_NH)
        logp = {"logp": run.readouts["logp"]}
        return read_out(run.policy.project, states_NH, token_N, logp, vocab_size=run.policy.vocab_size)

    return values


def trained_values(run: Run, states: list[Tensor]) -> ValuesFn:
    """All readouts on each canvas, with gradient. `states` are the reference's, by canvas."""

    def values(k: int, canvas_BL: Tensor, attention_BL: Tensor, at_BL: Tensor, token_N: Tensor) -> dict[str, Tensor]:
        given = {"reference_NH": states[k]} if states else {}
        return run.policy.read_out(canvas_BL, attention_BL, at_BL, token_N, run.readouts, given)

    return values


def estimate(run: Run, batch: Batch, m: int, values: ValuesFn) -> dict[str, Tensor]:
    """The estimator's values (BC...) of micro-batch m, by name."""
    rows = batch.micro[m]
    rollout, noise, advantage_B = batch.rollout.rows(rows), batch.noise.rows(rows), batch.advantage_B[rows]
    estimator, mask_id = run.algorithm.estimator, run.policy.mask_id
    return estimator.estimate(values, rollout, noise, mask_id, run.config.objective, advantage_B)


@dataclass
class Sums:
    """Sums over this rank's micro-batches: the loss, its metrics, their denominator; and values for quantiles."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, list[Tensor]] = field(default_factory=dict)


def accumulate_gradients(run: Run, batch: Batch, step: int, iteration: int) -> Sums:
    """One forward and backward pass over each micro-batch. Gradients are of the loss's sum, not yet divided."""
    config, policy, algorithm, sums = run.config, run.policy, run.algorithm, Sums()
    B = len(batch.advantage_B)
    key_B = row_keys(config.run.seed, step, global_rows(run.accelerator, B), f"dropout {iteration}")
    policy.train()  # gradient checkpointing and LoRA dropout are off otherwise
    for m, rows in enumerate(batch.micro):
        with policy.forward_passes(key_B[rows]):
            values = estimate(run, batch, m, trained_values(run, batch.reference_states[m]))
        if "old" in algorithm.needs and iteration == 0:  # nothing has moved yet, so these are the old ones
            batch.old[m] = values["logp"].detach()
        inputs = LossInputs(
            logp_BC=values["logp"],
            mask_BC=batch.noise.count_BC[rows],
            advantage_B=batch.advantage_B[rows],
            by_sequence=algorithm.estimator.level == "sequence",
            old_logp_BC=batch.old[m],
            ref_logp_BC=batch.reference[m] if "ref" in algorithm.needs else None,
            correction_BC=batch.correction_BC[rows] if batch.correction_BC is not None else None,
            readouts={name: value for name, value in values.items() if name != "logp"},
        )
        out = algorithm.objective.loss(inputs, config.objective)
        policy.backward(out.loss_sum)
        for name, value in {"loss": out.loss_sum, "n": out.denominator, **out.metrics}.items():
            sums.totals[name] = sums.totals.get(name, torch.zeros((), device=policy.device)) + value.detach()
        for name, value in out.samples.items():
            sums.samples.setdefault(name, []).append(value)
    policy.eval()
    return sums


def reduce_and_clip(run: Run, sums: Sums) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Sum over ranks, divide the gradients by the global denominator and clip them.

    Returns the sums by name, the denominator, and the gradient's norm before clipping.
    """
    parameters = list(adapter_parameters(run.policy).values())
    reduced = reduce_sum(run.accelerator, torch.stack(list(sums.totals.values())))
    totals = dict(zip(sums.totals, reduced, strict=True))
    count = totals.pop("n").clamp(min=1.0)
    sum_gradients(run.accelerator, parameters, count)
    return totals, count, torch.nn.utils.clip_grad_norm_(parameters, run.config.optim.max_grad_norm)


def keep_skipped(run: Run, scored: Scored, batch: Batch, step: int, totals: dict[str, Tensor]) -> None:
    """Write what this rank made a skipped update from."""
    kept = {
        "totals": totals,
        "prompts": scored.prompts.texts,
        "completions": scored.completions,
        "reward_B": scored.reward_B,
        "advantage_B": scored.advantage_B,
        "rollout": vars(scored.rollout),
        "noise": vars(batch.noise),
    }
    run_config = run.config.run
    keep_batch(Path(run_config.output_dir), run.accelerator.process_index, step, run_config.max_skipped, kept)


def completion_rows(scored: Scored) -> list[dict]:
    """This rank's completions as rows of a table."""
    columns = scored.prompts.texts, scored.completions, scored.reward_B.tolist(), scored.advantage_B.tolist()
    names = ("prompt", "completion", "reward", "advantage")
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
