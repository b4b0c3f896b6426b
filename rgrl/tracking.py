"""Where numbers go: `metrics.jsonl` always, W&B in its own mode, tables of completions in both."""

import json
import math
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rgrl.config import Config, to_dict

METRICS = {
    "reward": "mean total reward of the rollouts that trained this step (guided, if guidance is on)",
    "reward_std": "mean over groups of the standard deviation of total reward within the group",
    "rewards/<name>/mean": "mean of one part of the reward, unweighted",
    "rewards/<name>/std": "standard deviation of that part over all rows",
    "rewards/<name>/failed": "calls of a Python reward that raised or took too long, on all ranks, evaluation included",
    "frac_reward_zero_std": "share of groups whose rewards are all equal; they teach nothing",
    "completions/mean_length": "mean tokens up to and including the first end token",
    "completions/min_length": "the shortest row, in tokens",
    "completions/max_length": "the longest row, in tokens",
    "completions/clipped_ratio": "share of rows without an end token",
    "kl": "k3 estimate of KL(policy || base), nats per token",
    "clip_ratio/low": "grpo: share of tokens whose ratio was clipped from below",
    "clip_ratio/high": "grpo: share of tokens whose ratio was clipped from above",
    "ratio": "grpo: mean of exp(l - l_old), per token or per row; exactly 1 at the first update of a rollout",
    "ratio/p05": "its 5 % quantile; with ratio/p50 and ratio/p95 it tells how far the updates on a rollout went",
    "ratio/p50": "its median",
    "ratio/p95": "its 95 % quantile",
    "entropy": "mean entropy of the policy's own sampling distribution where tokens were committed, nats",
    "loss": "loss of the last update of this step",
    "grad_norm": "global norm of the gradient before clipping, last update",
    "grad_norm_clipped": "the same after clipping",
    "learning_rate": "rate used by the last update",
    "update/skipped": "updates of this step skipped for a loss or gradient that was not finite",
    "num_tokens": "completion tokens rolled out since the start of the run",
    "guidance/changed": "share of tokens committed by guided steps where guidance changed the most likely token",
    "guidance/broken": "gradients of the reward, one a hidden position, that were not finite and steered nothing",
    "guidance/delta_logp": "mean log-probability under the guided minus under the policy's own distribution, nats, "
    "over all rows, also those that `guidance.share` leaves unguided",
    "guidance/outside_support": "share of committed tokens outside the policy's own top-p/top-k support",
    "guidance/eta": "step size of guidance in this step",
    "guidance/entropy_weight/q1": "mean entropy weight w of hidden positions, first quarter of the denoising steps",
    "guidance/entropy_weight/q2": "the same in the second quarter",
    "guidance/entropy_weight/q3": "the same in the third",
    "guidance/entropy_weight/q4": "the same in the last",
    "guidance/reward_before": "mean reward of unguided completions of the first guidance.probe_prompts eval prompts",
    "guidance/reward_after": "the same with guidance and the same random numbers",
    "correction/mean": "mean weight of a row for having been guided, as `objective.correction` has it",
    "correction/ess": "effective sample size of those weights as a share of the rows, 0 ... 1",
    "correction/ess_full": "the same for the full, untruncated product of c over each row",
    "correction/token/p05": "5 % quantile of c of single tokens, policy over guided probability",
    "correction/token/p50": "median of it",
    "correction/token/p95": "95 % quantile of it",
    "correction/sequence_log/p05": "5 % quantile of the logarithm of the product of c over a row",
    "correction/sequence_log/p50": "median of it",
    "correction/sequence_log/p95": "95 % quantile of it",
    "eval/reward": "mean reward of unguided completions of the eval prompts",
    "eval/reward_std": "its standard deviation over samples",
    "eval/judge": "the same under the judge, which is never trained against",
    "eval/judge_std": "its standard deviation over samples",
    "eval/distinct_2": "distinct word pairs divided by all word pairs, over all eval completions",
    "eval/base_nll": "nats per token of those completions under the frozen base, at mask rates .25, .5, .75",
    "eval/kl": "their log-likelihood under the policy minus under the base, nats per token, at the same masks",
    "eval/length": "mean tokens of those completions",
    "step_time": "seconds of wall clock for the step, evaluation included",
    "time/rollout": "seconds of denoising, guided or not",
    "time/reward": "seconds of decoding and scoring",
    "time/update": "seconds of log-probabilities, gradients and optimizer",
    "time/eval": "seconds of evaluation",
    "time/checkpoint": "seconds that saving held up the run after the step before this one; writing goes on beside it",
}
TIMING = ("step_time", "time/")  # the metrics that two identical runs may differ in


WANDB_PATIENCE = 120.0  # seconds that the end of a run waits for W&B to take what is left


def warn(text: str) -> None:
    """One line on stderr, which leaves a progress bar in one piece."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


class Tracker:
    """The main process's record of a run; on other processes every method does nothing.

    `start_step` is the step resumed from: lines after it, left by a run that was killed, are dropped. What cannot be
    written raises nothing: `failures` say why, until somebody takes them or, of lines, which wait in memory, until they
    are written after all. Tables are lost.
    """

    def __init__(self, config: Config, start_step: int, enabled: bool) -> None:
        self.enabled, self.wandb = enabled, None
        self.failures: dict[str, str] = {}
        self._waiting: list[str] = []
        if not enabled:
            return
        self.folder = Path(config.run.output_dir)
        (self.folder / "completions").mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step] if start_step else []
        partial = self.path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(line) + "\n" for line in kept))
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(self.path)
        if config.tracking.wandb:
            self._with_wandb(lambda: setattr(self, "wandb", _start_wandb(config)))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line, flushed to disk; numbers that are not finite are written as null."""
        if not self.enabled:
            return
        clean = {k: (v if math.isfinite(v) else None) for k, v in metrics.items()}
        self._waiting.append(json.dumps({"step": step, **clean}) + "\n")
        self.flush()
        if self.wandb is not None:
            self._with_wandb(lambda: self.wandb.log(clean, step=step))

    def flush(self) -> bool:
        """Write the lines that wait, all or none of them; True if no line waits any more."""
        if not self._waiting:
            return True
        try:
            with self.path.open("ab", buffering=0) as handle:
                end = handle.seek(0, os.SEEK_END)
                text = "".join(self._waiting).encode()
                try:
                    while text:  # a disk that is nearly full takes a part first
                        text = text[handle.write(text) :]
                    os.fsync(handle.fileno())
                except OSError:
                    handle.truncate(end)
                    raise
            self._waiting = []
            self.failures.pop("lines", None)
        except OSError as error:
            self.failures["lines"] = f"cannot write {self.path}: {error}"
        return not self._waiting

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Save `completions/NAME_STEP.parquet`, and the same table to W&B."""
        if not self.enabled or not rows:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / "completions" / f"{name}_{step:06d}.parquet"
        partial = path.with_suffix(".partial")
        try:
            pq.write_table(pa.Table.from_pylist(rows), partial)
            partial.replace(path)
        except OSError as error:
            self.failures["table"] = f"cannot write {path}: {error}"
            partial.unlink(missing_ok=True)
        if self.wandb is not None:
            import wandb

            columns = list(rows[0])
            data = [[row[c] for c in columns] for row in rows]
            table = {f"completions/{name}": wandb.Table(columns=columns, data=data)}
            self._with_wandb(lambda: self.wandb.log(table, step=step))

    def close(self) -> None:
        """End W&B's run."""
        if self.wandb is not None:
            self._with_wandb(self.wandb.finish)

    def _with_wandb(self, call: Callable[[], object]) -> None:
        """A convenience must not end a run, and what it raises has no common base: say so once, go on without it."""
        try:
            call()
        except TimeoutError:
            warn(f"W&B has not taken everything: send the rest with `wandb sync {self.folder / 'wandb'}/run-*`")
        except Exception as error:
            self.wandb = None
            warn(
                f"W&B failed and is off for the rest of this run, whose own files go on: {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _start_wandb(config: Config) -> Any:
    import wandb

    folder = Path(config.run.output_dir)
    id_file = folder / "wandb_id.txt"
    run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
    id_file.write_text(run_id)
    asked = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode not in (None, "online", "shared")
    mode = None if asked or wandb.login(prompt=False, verify=False) else "offline"

    def begin(mode: str | None) -> Any:
        return wandb.init(
            project=config.tracking.project,
            name=config.tracking.name or folder.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=to_dict(config),
            mode=mode,
            settings=wandb.Settings(silent=True, finish_timeout=WANDB_PATIENCE, finish_timeout_raises=True),
        )

    try:
        return begin(mode)
    except wandb.errors.CommError as error:
        reason = " ".join(str(error).split())
        warn(f"W&B cannot be reached and keeps its record in {folder / 'wandb'}, for `wandb sync`: {reason}")
        return begin("offline")
