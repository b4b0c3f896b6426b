"""A run: `train` repeats the two halves of a step (step.py), evaluates, logs, saves and stops when it is asked to."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from rgrl.checkpoint import (
    Progress,
    Saver,
    check_compatible,
    check_prompts,
    check_writable,
    checkpoints,
    find_checkpoint,
    give_up_after,
    load,
    load_adapter,
)
from rgrl.config import REQUEUE, Config, ConfigError, RunStoppedError, to_dict
from rgrl.corrections import exact
from rgrl.evaluation import evaluate
from rgrl.metrics import counts
from rgrl.parts import Parts, join_processes, set_up
from rgrl.seeds import global_state, set_global_state
from rgrl.step import Clock, completion_rows, guidance_at, guide_of, roll_out, rollout_step, update_step
from rgrl.stopping import StopRequests, first_reason
from rgrl.tracking import Tracker, warn
from rgrl.types import Prompts


def train(config: Config) -> tuple[Path, bool]:
    """Run or resume the training that `config` describes; returns its output folder, and if this is the main process.

    Raises `ConfigError` for bad input, before any long work starts, and `RunStoppedError` where the run ends early.
    """
    with StopRequests(config.run.max_hours) as requests:
        check_writable(Path(config.run.output_dir))  # before others count on this process
        accelerator = join_processes(config)
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
                if resume is not None:
                    give_up_after(resume, progress.step, output)
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
            try:
                requeue.write_text(f"{reason}\n")  # some launchers turn every exit code into 1
            except OSError as error:  # all that matters is saved, and the exit code says the same
                warn(f"cannot write {requeue}: {error}")
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
            saver.save(accelerator, parts.policy, parts.optimizer, progress, fingerprint, tracker.flush())
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
            hopeless = progress.skipped_in_a_row >= config.run.max_skipped
            if due(progress.step, config.run.save_steps, config.run.steps) or unwritten or hopeless:
                save()
            if hopeless:
                raise RunStoppedError(
                    f"{progress.skipped_in_a_row} updates in a row had a loss or gradient that is not finite "
                    f"(`run.max_skipped`); their batches are in {Path(config.run.output_dir) / 'skipped'}"
                )
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
    found = next(iter(tracker.failures.values()), None)
    tracker.failures.clear()
    if saver.failure is not None:  # then no thread of it is at work, and what is reset here is what was read
        found, saver.failure = saver.failure, None
    return found


def cannot_write(config: Config, problem: str | None) -> RunStoppedError:
    """The end of a run that cannot write, for every process; only the main one, which knows why, prints its message."""
    found = checkpoints(Path(config.run.output_dir))
    whole = f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    return RunStoppedError(f"{problem}; {whole}")


def release(config: Config, end_of: str) -> None:
    """Give memory that torch keeps for reuse back to the GPU, if `run.empty_cache` says so at the end of this."""
    if config.run.empty_cache in ("phase", end_of):
        torch.cuda.empty_cache()


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


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
        scored = roll_out(parts, group, config.guidance, i, "sample", Clock())
        rows = completion_rows(scored)
        for j in range(0, len(rows), G):
            yield from sorted(rows[j : j + G], key=lambda row: -row["reward"])


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
