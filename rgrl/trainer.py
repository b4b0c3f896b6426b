"""A run: repeat the two halves of a step (step.py), evaluate, log, save, and stop when asked to.

Not called train.py: `rgrl.train` is the function, and a module of that name would hide it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from rgrl.checkpoint import (
    HEADER,
    MODEL,
    Progress,
    Saver,
    check_compatible,
    check_data,
    check_model,
    check_start,
    check_writable,
    checkpoints,
    find_checkpoint,
    kept,
    load,
    load_adapter,
    newest,
    owns_request,
    progress_of,
    set_aside_after,
    take_folder,
    warn_changed_models,
)
from rgrl.config import Config, as_yaml, check, located
from rgrl.console import inform, steady, warn
from rgrl.distributed import counts
from rgrl.errors import INTERRUPTED, REQUEUE, ConfigError, RunStoppedError
from rgrl.evaluation import Evaluation, Evaluator, generate_with, sampler
from rgrl.evaluation.alarm import History, basis, look, measure
from rgrl.evaluation.held_out import HeldOut
from rgrl.evaluation.intervals import intervals
from rgrl.folder import Owner, claim, not_ours
from rgrl.folder import replace as replace_file
from rgrl.header import data, header, what_runs
from rgrl.metrics import Clock
from rgrl.rewards import RewardCounts
from rgrl.rollout.guidance import guidance_at
from rgrl.runtime.launch import join_processes
from rgrl.runtime.skipped import keep_batch
from rgrl.runtime.stopping import StopRequests, first_reason
from rgrl.seeds import global_state, set_global_state
from rgrl.setup import Run, set_up
from rgrl.step import Scored, completion_rows, guidance_of, roll_out, rollout_step, update_step
from rgrl.tracking import Tracker
from rgrl.trial import dry_run


def train(config: Config) -> Path:
    """Run or resume the training that `config` describes; returns its output folder.

    Raises `ConfigError` for bad input, before any long work starts, and `RunStoppedError` where the run ends early.
    """
    check(config)
    with steady(), StopRequests(config.run.max_hours) as requests, ExitStack() as held:
        config = located(config)
        output = Path(config.run.output_dir)
        check_writable(output)  # before others count on this process
        accelerator = join_processes(config)
        resume, owner = take_folder(config, accelerator, held)
        run, progress = begin(config, accelerator, resume)
        config = run.config
        dry_run(run)
        accelerator.wait_for_everyone()  # nobody writes before everybody has looked at what is there
        tracker = open_output(run, owner, resume, progress)
        if accelerator.is_main_process:
            inform("\n".join(header(run, progress.step + 1, tracker.destinations())))
        saver = Saver(config, owner)
        loop = Loop(run, owner, progress, tracker, saver, requests, saved_step(config, resume, progress))
        try:
            reason = loop.run_steps()
        except KeyboardInterrupt:  # at once, so the folder stays locked until the checkpoint under way is written
            threading.Thread(target=close_after, args=(saver, held.pop_all()), daemon=True).start()
            raise
        except Exception:
            saver.wait()  # also on the way out of an error: a checkpoint under way is worth having
            raise
        saver.wait()
        tracker.flush()
        problem = take_failure(saver, tracker)
        if counts(accelerator, [int(problem is not None)])[0]:
            raise cannot_write(config, problem)
        tracker.close()
        if reason not in (None, "SIGINT") and accelerator.is_main_process:
            ask_for_requeue(output, reason)
        accelerator.wait_for_everyone()  # a launcher ends all processes when the first of them has gone
        if reason is not None:
            raise RunStoppedError(
                f"stopped at step {loop.progress.step} on {reason}; all is saved: go on with "
                "--run.resume_from_checkpoint latest",
                INTERRUPTED if reason == "SIGINT" else REQUEUE,
            )
        accelerator.end_training()
    return output


def close_after(saver: Saver, held: ExitStack) -> None:
    """Let go of what is held once nothing is being written."""
    with held:
        saver.wait()


def begin(config: Config, accelerator: Accelerator, resume: Path | None) -> tuple[Run, Progress]:
    """Load what the run is made of, as it was at the checkpoint to resume from. Raises `ConfigError`."""
    if resume is None:
        return set_up(config, accelerator), Progress()
    check_compatible(resume, config, accelerator.num_processes)
    check_start(resume, config)
    check_history(resume)
    run = set_up(config, accelerator, resumed=True)
    check_compatible(resume, run.config, None, ("lora.targets",))
    check_model(resume, run.policy)
    check_data(resume, run.fingerprints)
    if accelerator.is_main_process:
        warn_changed_models(resume, run.fingerprints, config)
    run = replace(run, fingerprints=run.fingerprints | kept(resume))
    return run, load(resume, accelerator, run.policy, run.optimizer, config.run.seed)


def check_history(resume: Path) -> None:
    """Refuse a checkpoint whose record of evaluations cannot be read. Raises `ConfigError`."""
    try:
        History.of(progress_of(resume).evaluations)
    except ValueError as error:
        raise ConfigError(f"cannot resume: {resume / 'progress.json'}: `evaluations` {error}") from error


def open_output(run: Run, owner: Owner, resume: Path | None, progress: Progress) -> Tracker:
    """Prepare the output folder: its config.yaml, no checkpoints of an abandoned branch, and the tracker."""
    config, main = run.config, run.accelerator.is_main_process
    output = Path(config.run.output_dir)
    try:
        if main:
            claim(output, owner)
            (output / "requeue").unlink(missing_ok=True)
            text = f"{HEADER}{owner.id}\n{as_yaml(config)}"
            replace_file(output / "config.yaml", text.encode(), owner)
            if resume is not None:
                set_aside_after(resume, progress.step, output, owner)
        return Tracker(config, owner, progress.step, main)
    except OSError as error:
        raise ConfigError(f"`run.output_dir` {output} cannot be written: {error}", on_one_rank=True) from error


def make_evaluators(run: Run, report: Callable[[str], None]) -> list[Evaluator]:
    """What a run is measured by; `report` shows progress. Add your evaluator here."""
    if run.eval_prompts is None:
        return []
    held_out = HeldOut(
        config=run.config,
        accelerator=run.accelerator,
        policy=run.policy,
        rewards=run.rewards,
        judge=run.judge,
        prompts=run.eval_prompts,
        guidance_at=lambda step: guidance_of(run, guidance_at(run.config, step)),
        report=report,
    )
    return [held_out]


def saved_step(config: Config, resume: Path | None, progress: Progress) -> int:
    """The step whose checkpoint `run.output_dir` holds already, -1 if none: a run may start from another folder's."""
    ours = [path.resolve() for path in checkpoints(Path(config.run.output_dir))]
    return progress.step if resume is not None and resume.resolve() in ours else -1


def ask_for_requeue(output: Path, reason: str) -> None:
    """Write a file with the reason why the run stopped: some launchers turn every exit code into 1."""
    try:
        if not owns_request(output / "requeue"):
            raise not_ours(output / "requeue")
        (output / "requeue").write_text(f"{reason}\n")
    except OSError as error:  # all that matters is saved, and the exit code has the same meaning
        warn(f"cannot write {output / 'requeue'}: {error}")


@dataclass
class Loop:
    """The steps of a run, and what surrounds them: evaluations, metrics, checkpoints, requests to stop."""

    run: Run
    owner: Owner
    progress: Progress
    tracker: Tracker
    saver: Saver
    requests: StopRequests
    saved: int  # step of the newest checkpoint
    clock: Clock = field(default_factory=Clock)
    evaluators: list[Evaluator] = field(default_factory=list)
    complained: bool = False  # about something that could not be written, after the step before
    alarm: str | None = None  # why the newest evaluation looks like reward hacking
    counts: RewardCounts = field(default_factory=RewardCounts)  # of rollouts and evaluations since the last line

    def run_steps(self) -> str | None:
        """Take the steps that are left; returns why the run ended before the last, if it did."""
        config, accelerator = self.run.config, self.run.accelerator
        with tqdm(  # an error closes it too, so its message has a line of its own
            total=config.run.steps,
            initial=self.progress.step,
            disable=not accelerator.is_main_process,
            desc="rgrl",
            unit="step",
        ) as bar:
            self.evaluators = make_evaluators(self.run, bar.set_postfix_str)
            reason = self.asked_to_stop()
            if self.evaluators and self.progress.step == 0 and reason is None:
                self.tracker.log(0, self.evaluate() | self.clock.seconds)
                bar.set_postfix_str("")
                self.clock = Clock()
                reason = self.asked_to_stop()
            while self.progress.step < config.run.steps and reason is None:
                reason = self.one_step(bar)
            if reason is not None and self.progress.step != self.saved:
                self.save()
        return reason if self.progress.step < config.run.steps else None

    def one_step(self, bar: tqdm) -> str | None:
        """Roll out, update, and record; returns why to stop, if any rank was asked to."""
        run, config, step, started = self.run, self.run.config, self.progress.step, time.perf_counter()
        state = global_state()
        prompts = run.prompts(step)
        scored = rollout_step(run, prompts, step, self.clock)
        self.counts += scored.reward.counts
        release(config, "phase")
        if reason := self.asked_to_stop():
            set_global_state(state)  # as before the rollout, which the resumed run makes again
            return reason
        update = update_step(run, scored, step, self.progress.skipped_in_a_row, self.clock)
        for batch in update.skipped:
            output, rank = Path(config.run.output_dir), run.accelerator.process_index
            keep_batch(output, self.owner, rank, step, config.run.max_skipped, batch)
        self.saver.check_weights(run.accelerator, run.policy, step + 1)
        release(config, "step")
        self.progress = replace(self.progress, step=step + 1, skipped_in_a_row=update.skipped_in_a_row)
        metrics = scored.metrics | update.metrics
        if due(step + 1, config.tracking.completions_steps, config.run.steps):
            self.tracker.table(step + 1, "train", gather_object(completion_rows(scored, config.data.column)))
        if self.evaluators and due(step + 1, config.run.eval_steps, config.run.steps):
            metrics |= self.evaluate()
        reason = self.record(scored, metrics, started)
        bar.set_postfix(reward=f"{metrics['reward']:.2f}")
        bar.update()
        return reason

    def record(self, scored: Scored, metrics: dict[str, float], started: float) -> str | None:
        """Log the step that ended, save if due, and decide with all ranks how to go on."""
        config, step = self.run.config, self.progress.step
        problem = take_failure(self.saver, self.tracker)
        tokens = int(scored.rollout.completion_mask_BC.sum())
        tokens, unwritten, reason, failed = exchange(
            self.run, self.requests, self.counts, tokens, problem is not None, step
        )
        self.counts = RewardCounts()
        self.progress = replace(self.progress, num_tokens=self.progress.num_tokens + tokens)
        metrics |= {"num_tokens": self.progress.num_tokens} | failed
        metrics["step_time"] = time.perf_counter() - started
        # The line is on disk before the checkpoint that follows it: a resumed run drops lines, it never lacks one.
        self.tracker.log(step, metrics | self.clock.seconds)
        self.clock = Clock()  # so the time of a checkpoint appears in the line after it
        if unwritten and config.run.on_write_error == "stop":
            raise cannot_write(config, problem)
        if problem is not None and not self.complained:
            warn(f"{problem}; the run goes on and tries again (run.on_write_error)")
        self.complained = unwritten
        hopeless = self.progress.skipped_in_a_row >= config.run.max_skipped
        # After the last step there is nothing left to stop.
        hacking = self.alarm is not None and config.run.on_hacking == "stop" and step < config.run.steps
        if due(step, config.run.save_steps, config.run.steps) or unwritten or hopeless or hacking:
            self.save()
        if hopeless:
            raise RunStoppedError(
                f"{self.progress.skipped_in_a_row} updates in a row had a loss or gradient that is not finite "
                f"(`run.max_skipped`); their batches are in {Path(config.run.output_dir) / 'skipped'}"
            )
        if hacking:
            raise RunStoppedError(
                f"stopped at step {step}, which looks like reward hacking: {self.alarm} (`run.on_hacking`); all is "
                "saved: go on with --run.resume_from_checkpoint latest --run.on_hacking warn, or from an older one"
            )
        return reason

    def asked_to_stop(self) -> str | None:
        """Why to stop, if any rank was asked to."""
        return first_reason(counts(self.run.accelerator, self.requests.asked()))

    def save(self) -> None:
        """Start to write a checkpoint of the last step."""
        run = self.run
        with self.clock.phase("checkpoint"):
            lines_written = self.tracker.flush()
            state = run.policy, run.optimizer, self.progress
            self.saver.save(run.accelerator, *state, run.fingerprints, lines_written)
        self.saved = self.progress.step

    def evaluate(self) -> dict[str, float]:
        """Run every evaluator, save its table, and return the metrics of all."""
        metrics: dict[str, float] = {}
        self.alarm = None
        with self.clock.phase("eval"):
            generate = generate_with(self.run.policy, self.run.config)
            for evaluator in self.evaluators:
                result = evaluator(generate, self.progress.step)
                self.tracker.table(self.progress.step, evaluator.name, result.rows)
                metrics |= result.metrics
                self.counts += result.counts or RewardCounts()
                if isinstance(evaluator, HeldOut) and self.run.config.run.on_hacking != "off":
                    metrics |= self.watch(result)
        return metrics

    def watch(self, result: Evaluation) -> dict[str, float]:
        """Look for reward hacking in an evaluation, and remember it; returns the metrics of that.

        Every rank has the same rows, and so finds the same.
        """
        run, step = self.run, self.progress.step
        history, now = History.of(self.progress.evaluations), basis(run.config, run.fingerprints)
        if history.basis != now or step == 0:  # the first evaluation is made again where a run stopped right after it
            if history.count and step and run.accelerator.is_main_process:
                inform("reward, judge, prompts or sampling have changed: the hacking alarm compares from here on only")
            history = History(now)
        found = look(history, measure(step, result.rows))
        self.progress = replace(self.progress, evaluations=found.history.saved())
        self.alarm = "; ".join(found.alarms) or None
        if self.alarm is not None and run.accelerator.is_main_process:
            warn(f"step {step} looks like reward hacking: {self.alarm} (± one standard error; see docs/hacking.md)")
        return found.metrics


def exchange(
    run: Run, requests: StopRequests, found: RewardCounts, tokens: int, unwritten: bool, step: int
) -> tuple[int, bool, str | None, dict[str, float]]:
    """One all-reduce at the end of a step, so that all ranks go on in the same way.

    Returns, over all ranks: the tokens rolled out; if the main process could not write something; why to stop, if
    anybody was asked to; and, as metrics, the failed calls of each Python reward, the completions that it gave None,
    and the texts that lost the beginning of their prompt.
    """
    names, asked = list(run.rewards.functions), requests.asked()
    for warning in found.warnings():
        warn(f"step {step}: {warning}")
    each = [of[name] for of in (found.failed, found.unrated) for name in names]
    tokens, count, cut, *rest = counts(run.accelerator, [tokens, int(unwritten), found.truncated, *asked, *each])
    reason, rest = first_reason(rest[: len(asked)]), rest[len(asked) :]
    keys = [f"rewards/{name}/{what}" for what in ("failed", "none") for name in names]
    failed = {key: float(n) for key, n in zip(keys, rest, strict=True)}
    if run.rewards.model is not None:
        failed[f"rewards/{run.rewards.model.name}/cut"] = float(cut)
    return tokens, count > 0, reason, failed


def take_failure(saver: Saver, tracker: Tracker) -> str | None:
    """Why something could not be written since the last call; known to the main process only."""
    found = next(iter(tracker.failures.values()), None)
    tracker.failures.clear()
    if saver.failure is not None:  # then its thread has ended, so resetting loses nothing
        found, saver.failure = saver.failure, None
    return found


def cannot_write(config: Config, problem: str | None) -> RunStoppedError:
    """The error of a run that cannot write, for every process. Only the main one, which knows why, prints it."""
    return RunStoppedError(f"{problem}; {newest(Path(config.run.output_dir))}")


def release(config: Config, end_of: str) -> None:
    """Return cached GPU memory if `run.empty_cache` says so at the end of this ("phase" or "step")."""
    if config.run.empty_cache in ("phase", end_of):
        torch.cuda.empty_cache()


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens after `step`."""
    return step == last or (every > 0 and step % every == 0)


# ------------------------------------------------------------------------------------ without training
def evaluate(config: Config) -> Evaluation:
    """Evaluate the adapter that `run.resume_from_checkpoint` or else `lora.path` names, without them the base.

    Every rank gets the result. Raises `ConfigError` for bad input.
    """
    # Nothing is trained, so nothing has to be known about what guidance is worth.
    run = open_checkpoint(replace(config, guidance=replace(config.guidance, probe_prompts=0)))
    shown = run.accelerator.is_main_process
    with tqdm(bar_format="rgrl: {desc} [{elapsed}]", disable=not shown, leave=False) as bar:
        evaluators = make_evaluators(run, bar.set_description_str)
        generate = generate_with(run.policy, run.config)
        results = [evaluator(generate, 0) for evaluator in evaluators]
    metrics = {name: value for result in results for name, value in result.metrics.items()}
    rows = [row for result in results for row in result.rows]
    report_failures(sum((result.counts or RewardCounts() for result in results), RewardCounts()))
    found = [result for evaluator, result in zip(evaluators, results, strict=True) if isinstance(evaluator, HeldOut)]
    for result in found if shown else []:
        inform(intervals(result.rows))
    word = next((row["top_word"] for row in rows if row.get("top_word") is not None), None)
    if shown and word is not None:
        inform(f"the content word that the most completions hold (eval/top_word): {word}")
    return Evaluation(metrics, rows)


def sample(config: Config) -> Iterator[dict]:
    """Completions of the eval prompts with their rewards, guided as the config says, best of each group first.

    They are sampled at `eval.temperature`. Raises `ConfigError` for bad input.
    """
    run = open_checkpoint(config)
    if run.accelerator.num_processes > 1:
        raise ConfigError(f"sampling runs in one process, and {run.accelerator.num_processes} were started")
    run = replace(run, config=replace(run.config, rollout=sampler(run.config)))
    assert run.eval_prompts is not None
    P, G = config.run.prompts_per_device, config.rollout.num_generations
    for i in range(0, len(run.eval_prompts), P):
        group = run.eval_prompts.take(list(range(i, min(i + P, len(run.eval_prompts))))).repeat(G)
        scored = roll_out(run, group, config.guidance, i, "sample", Clock())
        report_failures(scored.reward.counts)
        rows = completion_rows(scored, config.data.column)
        for j in range(0, len(rows), G):
            together = [{"index": i + j // G} | row for row in rows[j : j + G]]
            yield from sorted(together, key=lambda row: (row["reward"] is None, -(row["reward"] or 0.0)))


def report_failures(found: RewardCounts) -> None:
    """Warn of Python rewards that failed and gave 0 (`reward.on_error: zero`)."""
    for warning in found.warnings():
        warn(warning)


def open_checkpoint(config: Config) -> Run:
    """A run with the adapter that `run.resume_from_checkpoint` or else `lora.path` names, and evaluation prompts.

    Raises `ConfigError`.
    """
    check(config)
    config = located(config)
    accelerator = join_processes(config)
    folder = find_checkpoint(config, accelerator) if config.run.resume_from_checkpoint else None
    if folder is not None:
        # Another alpha would fit, and be another policy.
        check_compatible(folder, config, None, MODEL)
        check_start(folder, config)
    run = set_up(config, accelerator, resumed=folder is not None)
    if run.eval_prompts is None:
        raise ConfigError(
            "evaluation prompts are required here: `data.eval_path`, `data.eval_split` or `data.eval_fraction`, with "
            "`run.eval_steps` above 0"
        )
    if folder is not None:
        check_compatible(folder, run.config, None, ("lora.targets",))
        check_model(folder, run.policy)
        load_adapter(folder, run.policy)
    if run.accelerator.is_main_process:
        adapter = f"adapter: {folder or config.lora.path or 'none, the base model'}"
        inform("\n".join([what_runs(run), *data(run), adapter]))
    return run
