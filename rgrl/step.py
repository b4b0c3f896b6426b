"""One RGRL step, readable top to bottom: `rollout_step`, then `update_step`.

Every process holds the frozen model, whole or its part (FSDP2), and the same adapter, rolls out its own prompts, and
exchanges nothing but adapter gradients, a handful of sums and, where it has parts, the weights it is about to read.
"""

import io
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from rgrl.advantages import ADVANTAGES
from rgrl.checkpoint import Progress
from rgrl.config import Config, GuidanceConfig
from rgrl.corrections import correction
from rgrl.denoise import DenoiseStats, RolloutNoise, denoise
from rgrl.guidance import Guide
from rgrl.logprobs import ESTIMATORS
from rgrl.metrics import guidance_metrics, quantiles, reduce_sum, rollout_metrics, share
from rgrl.models.lora import adapter_parameters
from rgrl.objectives import OBJECTIVES
from rgrl.parts import Parts
from rgrl.rewards import resolve
from rgrl.sampling import sampled_logp
from rgrl.seeds import generators, row_keys
from rgrl.tracking import warn
from rgrl.types import LossInputs, NoiseDraw, Prompts, Rollout


@dataclass
class Scored:
    """A rollout with its text, its reward and its advantages."""

    prompts: Prompts  # B, each prompt G times
    rollout: Rollout
    completions: list[str]
    reward_B: Tensor
    parts: dict[str, Tensor]
    advantage_B: Tensor
    metrics: dict[str, float]


class Clock:
    """Seconds spent in each phase of a step, as `time/NAME`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        key = f"time/{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


def rollout_step(parts: Parts, step: int, clock: Clock) -> Scored:
    """Roll out G completions for each of this rank's prompts, score them, and compare them within groups."""
    prompts = parts.stream.batch(step, parts.accelerator.process_index)
    prompts = prompts.repeat(parts.config.rollout.num_generations)
    return roll_out(parts, prompts, guidance_at(parts.config, step), step, "rollout", clock)


def roll_out(parts: Parts, prompts: Prompts, guidance: GuidanceConfig, step: int, purpose: str, clock: Clock) -> Scored:
    """One completion for each of the B prompts, groups of G standing together, scored. `step` seeds the noise."""
    config, policy, accelerator = parts.config, parts.policy, parts.accelerator
    G = config.rollout.num_generations
    stats = DenoiseStats()
    with clock.phase("rollout"):
        prompt_BL, attention_BL = policy.encode_prompts(prompts.texts, config.data.max_prompt_length)
        noise = RolloutNoise.draw(
            generators(config.run.seed, step, global_rows(accelerator, len(prompts)), purpose),
            config.rollout.steps,
            config.rollout.max_completion_length,
            guidance.steps,
        )
        # The first of each group are guided, the others are the policy's own.
        guided_B = torch.arange(len(prompts)) % G < (round(guidance.share * G) if guidance.kind != "none" else 0)
        batches = [
            (rows_A, guided)
            for part, guided in ((guided_B.nonzero()[:, 0], True), ((~guided_B).nonzero()[:, 0], False))
            for rows_A in part.split(config.rollout.micro_batch or len(prompts))
            if len(rows_A)
        ]
        rollouts = []
        with policy.in_step():
            for rows_A, guided in batches:
                rollouts.append(
                    denoise(
                        policy.logits,
                        prompt_BL[rows_A],
                        attention_BL[rows_A],
                        policy.mask_id,
                        policy.is_end,
                        config.rollout,
                        noise.rows(rows_A),
                        guide_of(parts, prompts.take(rows_A.tolist()), guidance) if guided else None,
                        stats,
                    )
                )
        order_B = torch.cat([rows_A for rows_A, _ in batches]).argsort()
        rollout = Rollout.join(rollouts).rows(order_B.to(policy.device))
    with clock.phase("reward"):
        completions = policy.decode(rollout.completion_BC)
        reward_B, reward_parts = parts.rewards.score(prompts, completions)
        advantage = resolve(config.objective.advantage, "advantage", ADVANTAGES)
        advantage_B = advantage(reward_B, G, config.objective) if G > 1 else torch.zeros_like(reward_B)
    metrics = rollout_metrics(accelerator, rollout, policy.is_end, reward_B, reward_parts, G)
    metrics["entropy"] = share(accelerator, stats.entropy, stats.committed)
    if guided_B.any():
        metrics |= guidance_metrics(accelerator, config, rollout, stats)
        metrics["guidance/eta"] = guidance.eta
        if metrics["guidance/broken"] > 0 and accelerator.is_main_process:
            warn(f"{metrics['guidance/broken']:.0f} gradients of guidance were not finite and steered nothing")
    return Scored(prompts, rollout, completions, reward_B, reward_parts, advantage_B.to(policy.device), metrics)


def guidance_at(config: Config, step: int) -> GuidanceConfig:
    """The guidance of a training step: eta on its line from `eta` to `eta_final`; none where it has come to 0."""
    g, last = config.guidance, max(1, config.run.steps - 1)
    if g.eta_final is None:
        return g
    done = min(1.0, step / last)
    eta = (1 - done) * g.eta + done * g.eta_final
    return replace(g, eta=eta, kind=g.kind if eta > 0 else "none")


def guide_of(parts: Parts, prompts: Prompts, guidance: GuidanceConfig) -> Guide | None:
    """What steers completions of `prompts`; None where nothing does."""
    if guidance.kind == "none" or parts.guide is None or parts.guide.embedding_VD is None:
        return None
    return Guide(parts.guide.guide_for(prompts), parts.guide.embedding_VD, guidance, parts.config.reward.attend_eos)


def update_step(parts: Parts, scored: Scored, step: int, progress: Progress, clock: Clock) -> dict[str, float]:
    """Update the adapter `objective.iterations` times on one rollout; returns metrics of the last update."""
    config, policy, accelerator = parts.config, parts.policy, parts.accelerator
    objective = resolve(config.objective.name, "objective", OBJECTIVES)
    estimator = resolve(config.objective.estimator, "estimator", ESTIMATORS)
    rollout, parameters = scored.rollout, list(adapter_parameters(policy).values())
    B = rollout.canvas_BL.shape[0]
    size = B // config.run.gradient_accumulation_steps
    micro = [slice(i, i + size) for i in range(0, B, size)]
    needs = objective.needs | ({"ref"} if config.objective.beta > 0 else set())

    logp = policy.logp
    if estimator.as_sampled:
        r = config.rollout
        score = partial(sampled_logp, temperature=r.temperature, top_k=r.top_k, top_p=r.top_p)
        logp = partial(policy.logp, score=score)

    def estimate(rows: slice) -> Tensor:
        some, noise_some, advantage = rollout.rows(rows), noise.rows(rows), scored.advantage_B[rows]
        return estimator.estimate(logp, some, noise_some, policy.mask_id, config.objective, advantage)

    with clock.phase("update"):
        seeds = generators(config.run.seed, step, global_rows(accelerator, B), "noise")
        noise: NoiseDraw = estimator.draw(rollout, config.objective, seeds)
        correction_BC = correction(rollout, config.objective) if "behaviour" in needs else None
        old: list[Tensor | None] = [None] * len(micro)
        ref: list[Tensor | None] = [None] * len(micro)
        if "ref" in needs:
            with torch.no_grad(), policy.in_step(), policy.reference():
                ref = [estimate(rows) for rows in micro]
        metrics: dict[str, float] = {"update/skipped": 0.0}
        for iteration in range(config.objective.iterations):
            sums: dict[str, Tensor] = {}
            samples: dict[str, list[Tensor]] = {}
            key_B = row_keys(config.run.seed, step, global_rows(accelerator, B), f"dropout {iteration}")
            policy.train()  # gradient checkpointing and LoRA dropout are off otherwise
            for m, rows in enumerate(micro):
                policy.row_keys.key_B = key_B[rows]
                with policy.in_step() as spare:
                    new_BC = estimate(rows)
                if "old" in needs and iteration == 0:  # nothing has moved yet, so these are the old ones
                    old[m] = new_BC.detach()
                out = objective.loss(
                    LossInputs(
                        logp_BC=new_BC,
                        mask_BC=noise.count_BC[rows],
                        advantage_B=scored.advantage_B[rows],
                        by_sequence=estimator.level == "sequence",
                        old_logp_BC=old[m],
                        ref_logp_BC=ref[m],
                        correction_BC=correction_BC[rows] if correction_BC is not None else None,
                    ),
                    config.objective,
                )
                sum(spare, out.loss_sum).backward()
                for name, value in {"loss": out.loss_sum, "n": out.denominator, **out.metrics}.items():
                    sums[name] = sums.get(name, torch.zeros((), device=policy.device)) + value.detach()
                for name, value in out.samples.items():
                    samples.setdefault(name, []).append(value)
            policy.eval()
            totals = dict(zip(sums, reduce_sum(accelerator, torch.stack(list(sums.values()))), strict=True))
            count = totals.pop("n").clamp(min=1.0)
            share_gradients(accelerator, parameters, count)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
            rate = learning_rate(config, step * config.objective.iterations + iteration)
            if bool((norm + totals["loss"]).isfinite()):
                for group in parts.optimizer.param_groups:
                    group["lr"] = rate
                parts.optimizer.step()
                progress.skipped_in_a_row = 0
            else:
                metrics["update/skipped"] += 1
                progress.skipped_in_a_row += 1
                keep_batch(parts, scored, noise, step, {"grad_norm": norm, **totals})
            parts.optimizer.zero_grad(set_to_none=True)
            metrics |= {name: float(total / count) for name, total in totals.items()}
            metrics["learning_rate"] = rate
            metrics["grad_norm"] = float(norm)
            metrics["grad_norm_clipped"] = min(float(norm), config.optim.max_grad_norm)
            for name, values in samples.items():
                metrics |= quantiles(accelerator, name, torch.cat(values))
    return metrics


def learning_rate(config: Config, update: int) -> float:
    """Of an update, counted from 0 over the whole run: linear warm-up, then the schedule down to 0."""
    o, updates = config.optim, config.run.steps * config.objective.iterations
    if update < o.warmup_steps:
        return o.learning_rate * (update + 1) / o.warmup_steps
    done = (update - o.warmup_steps) / max(1, updates - o.warmup_steps)
    shares = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return o.learning_rate * shares[o.schedule]


def keep_batch(parts: Parts, scored: Scored, noise: NoiseDraw, step: int, totals: dict[str, Tensor]) -> None:
    """Write what this rank made a skipped update from to `skipped/`, where the newest `run.max_skipped` are kept."""
    rank, folder = parts.accelerator.process_index, Path(parts.config.run.output_dir) / "skipped"
    batch = {
        "step": step + 1,  # as in metrics.jsonl
        "totals": totals,
        "prompts": scored.prompts.texts,
        "completions": scored.completions,
        "reward_B": scored.reward_B,
        "advantage_B": scored.advantage_B,
        "rollout": vars(scored.rollout),
        "noise": vars(noise),
    }
    if rank == 0:
        told = ", ".join(f"{name} {float(totals[name]):g}" for name in ("loss", "grad_norm"))
        warn(f"step {step + 1}: an update is skipped ({told}); its batch is in {folder}")
    try:
        folder.mkdir(exist_ok=True)
        buffer = io.BytesIO()  # so that a full disk is an `OSError`
        torch.save(batch, buffer)
        (folder / f"step_{step + 1:06d}_rank_{rank}.pt").write_bytes(buffer.getbuffer())
        for old in sorted(folder.glob(f"step_*_rank_{rank}.pt"))[: -parts.config.run.max_skipped]:
            old.unlink()
    except OSError as error:  # a diagnosis must not end a run
        warn(f"cannot write {folder}: {error}")


def share_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter], count: Tensor) -> None:
    """Sum gradients over ranks and divide by the global `count`: one flat exchange of adapter size."""
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters])
    flat = reduce_sum(accelerator, flat).div_(count)
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)


def global_rows(accelerator: Accelerator, B: int) -> range:
    """The numbers of this rank's B rows among those of all ranks."""
    return range(accelerator.process_index * B, (accelerator.process_index + 1) * B)


def completion_rows(scored: Scored) -> list[dict]:
    """This rank's completions as rows of a table."""
    return [
        {"prompt": prompt, "completion": text, "reward": r, "advantage": a}
        for prompt, text, r, a in zip(
            scored.prompts.texts, scored.completions, scored.reward_B.tolist(), scored.advantage_B.tolist(), strict=True
        )
    ]
