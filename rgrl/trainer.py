"""One RGRL step, readable top to bottom: `rollout_step`, then `update_step`; `train` repeats them.

Every process holds the frozen model, whole or its part (FSDP2), and the same adapter, rolls out its own prompts, and
exchanges nothing but adapter gradients, a handful of sums and, where it has parts, the weights it is about to read.
"""

import io
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from rgrl.advantages import ADVANTAGES
from rgrl.checkpoint import (
    Progress,
    Saver,
    check_compatible,
    check_prompts,
    check_writable,
    checkpoints,
    find_checkpoint,
    load,
    load_adapter,
)
from rgrl.config import REQUEUE, Config, ConfigError, GuidanceConfig, RunStoppedError, to_dict
from rgrl.corrections import correction, exact
from rgrl.data import PromptStream, load_prompts
from rgrl.denoise import DenoiseStats, RolloutNoise, denoise
from rgrl.evaluation import evaluate
from rgrl.guidance import Guide
from rgrl.launch import check_launch, shard_size
from rgrl.logprobs import ESTIMATORS, Estimator
from rgrl.metrics import counts, guidance_metrics, quantiles, reduce_sum, rollout_metrics, share
from rgrl.models import Policy, add_lora, load_policy
from rgrl.models.lora import adapter_parameters, check_gradients
from rgrl.objectives import OBJECTIVES, Objective
from rgrl.rewards import ClassifierReward, Rewards, load_classifier, load_rewards, resolve
from rgrl.sampling import sampled_logp
from rgrl.seeds import generators, global_state, row_keys, seed_globals, set_global_state
from rgrl.stopping import StopRequests, first_reason
from rgrl.tracking import Tracker, warn
from rgrl.types import LossInputs, NoiseDraw, Prompts, Rollout


@dataclass
class Parts:
    """Everything a run is made of, loaded and checked before any long work."""

    config: Config
    accelerator: Accelerator
    policy: Policy
    rewards: Rewards
    guide: ClassifierReward | None
    judge: ClassifierReward | None
    stream: PromptStream
    eval_prompts: Prompts | None
    optimizer: torch.optim.Optimizer


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


def train(config: Config) -> tuple[Path, bool]:
    """Run or resume the training that `config` describes; returns its output folder, and if this is the main process.

    Raises `ConfigError` for bad input, before any long work starts, and `RunStoppedError` where the run ends early.
    """
    with StopRequests(config.run.max_hours) as requests:
        accelerator = join_processes(config)
        check_writable(Path(config.run.output_dir))
        resume = find_checkpoint(config, accelerator)
        if resume is not None:
            check_compatible(resume, config, accelerator.num_processes)
        parts = set_up(config, accelerator)
        progress = Progress()
        if resume is not None:
            check_prompts(resume, parts.stream.fingerprint())
            progress = load(resume, accelerator, parts.policy, parts.optimizer, config.run.seed)
        accelerator.wait_for_everyone()  # nobody writes before everybody has looked at what is there
        output, requeue = Path(config.run.output_dir), Path(config.run.output_dir) / "requeue"
        try:
            if accelerator.is_main_process:
                output.mkdir(parents=True, exist_ok=True)
                requeue.unlink(missing_ok=True)
                (output / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
            tracker, saver = Tracker(config, progress.step, accelerator.is_main_process), Saver(config)
        except OSError as error:
            raise ConfigError(f"`run.output_dir` {output} cannot be written: {error}", on_one_rank=True) from error
        if config.objective.correction != "none" and config.guidance.kind != "none":
            kind = "exact" if exact(config) else "an approximation (see `exact` in rgrl/corrections.py)"
            accelerator.print(f"correcting for guidance: the ratio of a whole completion is {kind}")
        try:
            reason = run_steps(parts, progress, tracker, saver, requests, resume)
        finally:
            saver.wait()  # also on the way out of an error: what is being written is worth having
        tracker.flush()
        problem = take_failure(saver, tracker)
        if counts(accelerator, [int(problem is not None)])[0]:
            raise cannot_write(config, problem)
        tracker.close()
        if reason is not None and accelerator.is_main_process:
            requeue.write_text(f"{reason}\n")  # some launchers turn every exit code into 1
        accelerator.wait_for_everyone()  # a launcher ends all processes when the first of them has gone
        if reason is not None:
            raise RunStoppedError(
                f"stopped at step {progress.step} on {reason}; all is saved: go on with "
                "--run.resume_from_checkpoint latest",
                REQUEUE,
            )
        accelerator.end_training()
    return output, accelerator.is_main_process


def run_steps(
    parts: Parts, progress: Progress, tracker: Tracker, saver: Saver, requests: StopRequests, resume: Path | None
) -> str | None:
    """Take the steps that are left, and save what they lead to; returns why it ended before the last, if it did."""
    config, accelerator = parts.config, parts.accelerator
    own = checkpoints(Path(config.run.output_dir)) if resume is not None else []
    saved = progress.step if resume is not None and resume.resolve() in [path.resolve() for path in own] else -1
    fingerprint, clock, complained = parts.stream.fingerprint(), Clock(), False

    def save() -> None:
        nonlocal saved
        with clock.phase("checkpoint"):
            saver.save(
                accelerator,
                parts.policy,
                parts.optimizer,
                progress,
                fingerprint,
                tracker.flush(),
            )
        saved = progress.step

    with tqdm(  # closed also by an error, whose message then has a line of its own
        total=config.run.steps, initial=progress.step, disable=not accelerator.is_main_process, desc="rgrl", unit="step"
    ) as bar:
        if parts.eval_prompts is not None and progress.step == 0:
            tracker.log(0, run_eval(parts, tracker, 0, clock) | clock.seconds)
            clock = Clock()
        reason = first_reason(counts(accelerator, requests.asked()))
        while progress.step < config.run.steps and reason is None:
            step, state, started = progress.step, global_state(), time.perf_counter()
            scored = rollout_step(parts, step, clock)
            release(config, "phase")
            if reason := first_reason(counts(accelerator, requests.asked())):
                set_global_state(state)  # as before the rollout, which the resumed run makes again
                break
            metrics = scored.metrics | update_step(parts, scored, step, progress, clock)
            release(config, "step")
            progress.step += 1
            if due(progress.step, config.tracking.completions_steps, config.run.steps):
                tracker.table(progress.step, "train", gather_object(completion_rows(scored)))
            if parts.eval_prompts is not None and due(progress.step, config.run.eval_steps, config.run.steps):
                metrics |= run_eval(parts, tracker, progress.step, clock)
            problem = take_failure(saver, tracker)
            tokens = int(scored.rollout.completion_mask_BC.sum())
            tokens, unwritten, reason, failed = exchange(parts, requests, tokens, problem is not None, progress.step)
            progress.num_tokens += tokens
            metrics |= {"num_tokens": progress.num_tokens} | failed
            metrics["step_time"] = time.perf_counter() - started
            # The line is on disk before the checkpoint that follows it: a resumed run drops lines, it never lacks one.
            tracker.log(progress.step, metrics | clock.seconds)
            clock = Clock()  # so the time of a checkpoint is told in the line after it
            if unwritten and config.run.on_write_error == "stop":
                raise cannot_write(config, problem)
            if problem is not None and not complained:
                warn(f"{problem}; the run goes on and tries again (run.on_write_error)")
            complained = unwritten
            if due(progress.step, config.run.save_steps, config.run.steps) or unwritten:
                save()
            bar.set_postfix(reward=f"{metrics['reward']:.2f}")
            bar.update()
        if reason is not None and progress.step != saved:
            save()
    return reason if progress.step < config.run.steps else None


def exchange(
    parts: Parts, requests: StopRequests, tokens: int, unwritten: bool, step: int
) -> tuple[int, bool, str | None, dict[str, float]]:
    """What ranks tell each other at the end of a step, at once, so that all of them go the same way from there.

    Returns, over all ranks: the tokens rolled out; if the main process could not write something; why to stop, if
    anybody was asked to; and the failed calls of each Python reward, as metrics.
    """
    failures, names, asked = parts.rewards.failures, list(parts.rewards.functions), requests.asked()
    for name, problem in dict(reversed(failures)).items():  # the first of each
        warn(f"step {step}: reward {name!r} {problem}; its completions got 0 (reward.on_error)")
    calls = [sum(name == of for of, _ in failures) for name in names]
    failures.clear()
    tokens, count, *rest = counts(parts.accelerator, [tokens, int(unwritten), *asked, *calls])
    reason, calls = first_reason(rest[: len(asked)]), rest[len(asked) :]
    failed = {f"rewards/{name}/failed": float(n) for name, n in zip(names, calls, strict=True)}
    return tokens, count > 0, reason, failed


def take_failure(saver: Saver, tracker: Tracker) -> str | None:
    """Why something could not be written since this was last asked; known to the main process only."""
    found = None
    for writer in (tracker, saver):
        if writer.failure is not None:  # then no thread of it is at work, and what is reset here is what was read
            found, writer.failure = writer.failure, None
    return found


def cannot_write(config: Config, problem: str | None) -> RunStoppedError:
    """The end of a run that cannot write, for every process; only the main one, which knows why, prints its message."""
    found = checkpoints(Path(config.run.output_dir))
    whole = f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    return RunStoppedError(f"{problem}; {whole}")


def join_processes(config: Config) -> Accelerator:
    """This process joined with the others that were started with it, by gloo where there is no GPU.

    Raises `ConfigError` for a launch that cannot work, such as processes that would not know of each other: each would
    be a main process writing to the same folder.
    """
    check_launch(os.environ)
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=config.run.timeout_minutes))
    # Accelerate's launcher starts several CPU processes only as if they were for GPUs, and doesn't tell them.
    on_cpus = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpus, kwargs_handlers=[patience])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started but Accelerate joined {accelerator.num_processes}: without GPUs, set "
            "ACCELERATE_USE_CPU=true"
        )
    return accelerator


def _open_checkpoint(config: Config) -> tuple[Parts, Prompts]:
    """The parts of a run with the adapter that `run.resume_from_checkpoint` names, and its eval prompts."""
    accelerator = join_processes(config)
    folder = find_checkpoint(config, accelerator) if config.run.resume_from_checkpoint else None
    if folder is not None:
        check_compatible(folder, config, None, ("lora",))  # another alpha would fit and be another policy
    parts = set_up(config, accelerator)
    if parts.eval_prompts is None:
        raise ConfigError("`data.eval_path` is required here, with `run.eval_steps` above 0")
    if folder is not None:
        load_adapter(folder, parts.policy)
    return parts, parts.eval_prompts


def evaluate_checkpoint(config: Config) -> tuple[dict[str, float], bool]:
    """The `eval/*` metrics of one adapter (or the base), and whether this is the main process."""
    parts, prompts = _open_checkpoint(config)
    result = evaluate(config, parts.accelerator, parts.policy, parts.rewards, parts.judge, prompts)
    return result.metrics, parts.accelerator.is_main_process


def sample(config: Config) -> Iterator[dict]:
    """Completions of the eval prompts with their rewards, guided as the config says, best of each group first."""
    parts, prompts = _open_checkpoint(config)
    if parts.accelerator.num_processes > 1:
        raise ConfigError(f"sampling runs in one process, and {parts.accelerator.num_processes} were started")
    P, G = config.run.prompts_per_device, config.rollout.num_generations
    for i in range(0, len(prompts), P):
        group = Prompts(prompts.texts[i : i + P], prompts.rows[i : i + P]).repeat(G)
        scored = roll_out(parts, group, i, "sample", Clock())
        rows = completion_rows(scored)
        for j in range(0, len(rows), G):
            yield from sorted(rows[j : j + G], key=lambda row: -row["reward"])


def set_up(config: Config, accelerator: Accelerator) -> Parts:
    """Load every part and check what only the parts together can tell. Raises `ConfigError`."""
    device = accelerator.device
    # Nothing here reads the global generators, but a user's own reward or objective may.
    seed_globals(config.run.seed, 0, accelerator.process_index)
    check_objective(config)
    prompts = load_prompts(config.data.path, config.data)
    eval_prompts = None
    if config.data.eval_path is not None and config.run.eval_steps:
        every = load_prompts(config.data.eval_path, config.data)
        n = config.data.eval_prompts
        eval_prompts = Prompts(every.texts[:n], every.rows[:n])
    size = shard_size(os.environ, accelerator.num_processes)
    policy = load_policy(config.model, device if size == 1 else "cpu")  # a GPU may not hold it whole
    texts = prompts.texts + (eval_prompts.texts if eval_prompts is not None else [])
    longest = policy.encode_prompts(texts, config.data.max_prompt_length)[0].shape[1]
    if longest + config.rollout.max_completion_length > policy.max_length:
        raise ConfigError(
            f"`rollout.max_completion_length` {config.rollout.max_completion_length} after a prompt of {longest} "
            f"tokens is beyond the model's {policy.max_length} positions"
        )
    rewards, guide = load_rewards(config, device)
    if guide is not None:
        guide.bind(policy.tokenizer, policy.vocab_size, config.reward.bridge)
    judge = load_classifier(config.judge.path, device, config.judge.dtype, name="judge") if config.judge.path else None
    add_lora(policy, config.lora, config.run.seed).eval()
    if size > 1:
        policy.shard(device, size, timedelta(minutes=config.run.timeout_minutes))
    check_gradients(policy)
    if config.run.gradient_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(adapter_parameters(policy).values())
    o = config.optim
    optimizer = torch.optim.AdamW(parameters, lr=o.learning_rate, weight_decay=o.weight_decay)
    stream = PromptStream(prompts, config.run.seed, config.run.prompts_per_device, accelerator.num_processes)
    return Parts(config, accelerator, policy, rewards, guide, judge, stream, eval_prompts, optimizer)


def check_objective(config: Config) -> None:
    """Refuse an objective, an estimator and an advantage that don't exist or don't go together."""
    o, found = config.objective, {}
    for what, name, known, kind in (
        ("objective", o.name, OBJECTIVES, Objective),
        ("estimator", o.estimator, ESTIMATORS, Estimator),
        ("advantage", o.advantage, ADVANTAGES, Callable),
    ):
        found[what] = resolve(name, what, known)
        if not isinstance(found[what], kind):
            raise ConfigError(f"{what} {name!r} is not of the type {kind.__name__}")
    objective, estimator = found["objective"], found["estimator"]
    if objective.estimators and o.estimator not in objective.estimators:
        raise ConfigError(
            f"`objective.name: {o.name}` needs `objective.estimator: {' or '.join(sorted(objective.estimators))}`, "
            f"not {o.estimator}"
        )
    if "old" in objective.needs and o.level == "token" and estimator.level == "sequence":
        raise ConfigError(
            f"`objective.estimator: {o.estimator}` estimates whole completions: `objective.name: {o.name}` needs "
            "`objective.level: sequence` with it"
        )
    if o.correction != "none" and "behaviour" not in objective.needs:
        raise ConfigError(f"`objective.name: {o.name}` takes no correction: set `objective.correction: none`")


def learning_rate(config: Config, update: int) -> float:
    """Of an update, counted from 0 over the whole run: linear warm-up, then the schedule down to 0."""
    o, updates = config.optim, config.run.steps * config.objective.iterations
    if update < o.warmup_steps:
        return o.learning_rate * (update + 1) / o.warmup_steps
    done = (update - o.warmup_steps) / max(1, updates - o.warmup_steps)
    shares = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return o.learning_rate * shares[o.schedule]


def release(config: Config, end_of: str) -> None:
    """Give memory that torch keeps for reuse back to the GPU, if `run.empty_cache` says so at the end of this."""
    if config.run.empty_cache in ("phase", end_of):
        torch.cuda.empty_cache()


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def rollout_step(parts: Parts, step: int, clock: Clock) -> Scored:
    """Roll out G completions for each of this rank's prompts, score them, and compare them within groups."""
    prompts = parts.stream.batch(step, parts.accelerator.process_index)
    return roll_out(parts, prompts.repeat(parts.config.rollout.num_generations), step, "rollout", clock)


def roll_out(parts: Parts, prompts: Prompts, step: int, purpose: str, clock: Clock) -> Scored:
    """One guided completion for each of the B prompts, groups of G standing together, scored."""
    config, policy, accelerator = parts.config, parts.policy, parts.accelerator
    G = config.rollout.num_generations
    stats = DenoiseStats()
    with clock.phase("rollout"):
        prompt_BL, attention_BL = policy.encode_prompts(prompts.texts, config.data.max_prompt_length)
        guidance = guidance_at(config, step)
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
        rollout = take(join(rollouts), order_B.to(policy.device))
    with clock.phase("reward"):
        completions = policy.decode(rollout.completion_BC)
        reward_B, reward_parts = parts.rewards.score(prompts, completions)
        advantage = resolve(config.objective.advantage, "advantage", ADVANTAGES)
        advantage_B = advantage(reward_B, G, config.objective) if G > 1 else torch.zeros_like(reward_B)
    metrics = rollout_metrics(accelerator, rollout, policy.is_end, reward_B, reward_parts, G)
    metrics["entropy"] = share(accelerator, stats.entropy, stats.committed)
    if stats.changed:
        metrics |= guidance_metrics(accelerator, config, rollout, stats)
        metrics["guidance/eta"] = guidance.eta
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
        some, noise_some, advantage = take(rollout, rows), noise.rows(rows), scored.advantage_B[rows]
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
                if progress.skipped_in_a_row >= config.run.max_skipped:
                    raise RunStoppedError(
                        f"{progress.skipped_in_a_row} updates in a row had a loss or gradient that is not finite "
                        f"(`run.max_skipped`); their batches are in {Path(config.run.output_dir) / 'skipped'}"
                    )
            parts.optimizer.zero_grad(set_to_none=True)
            metrics |= {name: float(total / count) for name, total in totals.items()}
            metrics["learning_rate"] = rate
            metrics["grad_norm"] = float(norm)
            metrics["grad_norm_clipped"] = min(float(norm), config.optim.max_grad_norm)
            for name, values in samples.items():
                metrics |= quantiles(accelerator, name, torch.cat(values))
    return metrics


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


def global_rows(accelerator: Accelerator, B: int) -> range:
    """The numbers of this rank's B rows among those of all ranks."""
    return range(accelerator.process_index * B, (accelerator.process_index + 1) * B)


def share_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter], count: Tensor) -> None:
    """Sum gradients over ranks and divide by the global `count`: one flat exchange of adapter size."""
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters])
    flat = reduce_sum(accelerator, flat) / count
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)


def take(rollout: Rollout, rows: slice | Tensor) -> Rollout:
    return Rollout(**{name: value[rows] for name, value in vars(rollout).items()})


def join(rollouts: list[Rollout]) -> Rollout:
    return Rollout(**{name: torch.cat([getattr(r, name) for r in rollouts]) for name in vars(rollouts[0])})


def completion_rows(scored: Scored) -> list[dict]:
    """This rank's completions as rows of a table."""
    return [
        {"prompt": prompt, "completion": text, "reward": r, "advantage": a}
        for prompt, text, r, a in zip(
            scored.prompts.texts, scored.completions, scored.reward_B.tolist(), scored.advantage_B.tolist(), strict=True
        )
    ]


def run_eval(parts: Parts, tracker: Tracker, step: int, clock: Clock) -> dict[str, float]:
    assert parts.eval_prompts is not None
    guidance = guidance_at(parts.config, step)
    with clock.phase("eval"):
        result = evaluate(
            parts.config,
            parts.accelerator,
            parts.policy,
            parts.rewards,
            parts.judge,
            parts.eval_prompts,
            partial(guide_of, parts, guidance=guidance) if guidance.kind != "none" else None,
        )
        tracker.table(step, "eval", result.rows)
    return result.metrics
