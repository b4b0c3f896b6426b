"""Unguided completions of held-out prompts, under the reward, the judge and the frozen base."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rgrl.algo.estimators import masked_nll
from rgrl.config import Config, EvalConfig
from rgrl.evaluation import Evaluation, Generate, noise_of
from rgrl.evaluation.guards import distinct, empty, top_word
from rgrl.evaluation.passes import least_of, passes
from rgrl.models import Policy
from rgrl.rewards import ClassifierReward, RewardCounts, Rewards
from rgrl.rollout import Guidance
from rgrl.seeds import generator
from rgrl.tracking.columns import OURS, data_columns, or_none, parts_of
from rgrl.types import Prompts, Rollout


@dataclass
class Gathered:
    """What this rank has measured so far."""

    # float64: negative log-likelihood under the base, number of tokens, the first under the policy; texts that were too
    # long for the judge
    sums_4: Tensor
    rows: list[dict[str, Any]] = field(default_factory=list)
    guided: dict[int, float | None] = field(default_factory=dict)  # reward if guided, by number of the prompt
    counts: RewardCounts = field(default_factory=RewardCounts)


@dataclass
class HeldOut:
    """`eval.samples` unguided completions of each prompt, each always with the same random numbers.

    Where `guidance_at` gives guidance for a step, the first `guidance.probe_prompts` prompts are also completed with it
    and the random numbers of their first completion, to measure what guidance is worth. None of that enters `eval/*`.
    """

    config: Config
    accelerator: Accelerator
    policy: Policy
    rewards: Rewards
    judge: ClassifierReward | None
    prompts: Prompts
    guidance_at: Callable[[int], Guidance | None]
    report: Callable[[str], None]  # shows progress beside the bar
    name: str = "eval"

    def __call__(self, generate: Generate, step: int) -> Evaluation:
        """The evaluation, over all ranks."""
        guidance, policy, n = self.guidance_at(step), self.policy, self.config.eval.samples
        # The completions of a prompt stand together: they share its first forward pass.
        every = [(i, s) for i in range(len(self.prompts)) for s in range(n)]
        ranks = self.accelerator.num_processes
        mine = every[self.accelerator.process_index :: ranks]
        rollout = self.config.rollout
        size = rollout.micro_batch or max(8, self.config.run.prompts_per_device * rollout.num_generations)
        gathered = Gathered(torch.zeros(4, device=policy.device, dtype=torch.float64))
        with policy.forward_passes():
            for start in range(0, len(mine), size):
                self.report(f"evaluating {start * ranks}/{len(every)}")
                batch = mine[start : start + size]
                self._unguided(generate, batch, gathered)
                probe = [i for i, s in batch if s == 0 and i < self.config.guidance.probe_prompts]
                if guidance is not None and probe:
                    prompts = self.prompts.take(probe)
                    steered = generate(prompts, probe, guidance)
                    reward = self.rewards.score(prompts, policy.decode(steered.completion_BC))
                    gathered.counts += reward.counts
                    gathered.guided |= dict(zip(probe, or_none(reward.total_B), strict=True))
        return self._over_all_ranks(gathered)

    def _unguided(self, generate: Generate, batch: list[tuple[int, int]], gathered: Gathered) -> None:
        """Add completions, each named by its prompt's number and its sample's, with their scores and likelihoods."""
        numbers, samples = [i for i, _ in batch], [s for _, s in batch]
        prompts = self.prompts.take(numbers)
        rollout = generate(prompts, numbers, samples=samples)
        completions = self.policy.decode(rollout.completion_BC)
        reward = self.rewards.score(prompts, completions)
        gathered.counts += reward.counts
        judged: list[float] | list[None] = [None] * len(prompts)
        if self.judge is not None:
            scores = self.judge.score(prompts, completions)
            judged = scores.reward_B.tolist()
            gathered.sums_4[3] += scores.truncated
        policy_nll, _ = self._masked_nll(rollout, batch)
        with self.policy.reference():
            base = self._masked_nll(rollout, batch)
        gathered.sums_4[:3] += torch.stack([*base, policy_nll]).double()
        lengths = rollout.completion_mask_BC.sum(1).tolist()
        columns = numbers, samples, prompts.texts, completions, or_none(reward.total_B), judged, lengths
        names = ("index", "sample", "prompt", "completion", "reward", "judge", "length")
        for row, parts in zip(zip(*columns, strict=True), parts_of(reward.terms), strict=True):
            gathered.rows.append(dict(zip(names, row, strict=True)) | parts)

    def _masked_nll(self, rollout: Rollout, batch: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        seeds = [generator(self.config.run.seed, 0, i, noise_of("base_nll", s)) for i, s in batch]
        return masked_nll(self.policy.logp, rollout, seeds, self.policy.mask_id)

    def _over_all_ranks(self, gathered: Gathered) -> Evaluation:
        rows = sorted(gather_object(gathered.rows), key=lambda row: (row["index"], row["sample"]))
        guided = dict(gather_object(list(gathered.guided.items())))
        base_nll, count, policy_nll, truncated = self.accelerator.reduce(gathered.sums_4, "sum").tolist()
        reward = [row["reward"] for row in rows if row["reward"] is not None]
        texts = [row["completion"] for row in rows]
        word, held = top_word([row["prompt"] for row in rows], texts)
        metrics = {
            "eval/reward": _mean(reward),
            "eval/reward_std": _std(reward),
            "eval/distinct_1": distinct(texts, 1),
            "eval/distinct_2": distinct(texts, 2),
            "eval/top_word": sum(held) / len(rows),
            "eval/empty": empty(texts),
            "eval/base_nll": base_nll / max(count, 1.0),
            "eval/kl": (base_nll - policy_nll) / max(count, 1.0),
            "eval/length": _mean([row["length"] for row in rows]),
        }
        metrics |= metrics_of_parts(rows, self.rewards, self.config.eval)
        if guided:
            first = {row["index"]: row["reward"] for row in rows if row["sample"] == 0}
            both = [
                (first[i], after) for i, after in sorted(guided.items()) if first[i] is not None and after is not None
            ]
            metrics["guidance/reward_before"] = _mean([before for before, _ in both])
            metrics["guidance/reward_after"] = _mean([after for _, after in both])
        if self.judge is not None:
            metrics["eval/judge"] = _mean([row["judge"] for row in rows])
            metrics["eval/judge_std"] = _std([row["judge"] for row in rows])
            metrics["eval/judge_cut"] = truncated
        for row, holds, chat in zip(rows, held, self._chats(rows), strict=True):
            row |= {"guided": False, "top_word": word if holds else None} | chat
        return Evaluation(metrics, [self._with_columns(row) for row in rows], gathered.counts)

    def _chats(self, rows: list[dict[str, Any]]) -> list[dict[str, str | None]]:
        """The column `chat`: a judge's prompt, as JSON, where some prompts are chats of several turns."""
        chats = list(self.prompts.chats)
        if all(isinstance(chat, str) for chat in chats):
            return [{}] * len(rows)
        written = [None if isinstance(chat, str) else json.dumps(chat, ensure_ascii=False) for chat in chats]
        return [{"chat": written[row["index"]]} for row in rows]

    def _with_columns(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as tables have it, with the columns of the data."""
        parts = {name: value for name, value in row.items() if name.startswith("rewards/")}
        others = {name: value for name, value in row.items() if name not in parts}
        data = data_columns(self.prompts.rows[row["index"]], self.config.data.column, row["prompt"])
        return {name: others[name] for name in OURS if name in others} | parts | data


def metrics_of_parts(rows: list[dict[str, Any]], rewards: Rewards, config: EvalConfig) -> dict[str, float]:
    """For each part of the reward: its mean, how many completions it gave none, and how often it was passed.

    `rows` are those of a table, the completions of a prompt one after another. A penalty has no pass.
    """
    functions, metrics = set(rewards.functions), dict[str, float]()
    for column in [name for name in rows[0] if name.startswith("rewards/")]:
        name = column.removeprefix("rewards/")
        values = [row[column] for row in rows]
        rated = [value for value in values if value is not None]
        metrics[f"eval/{column}/mean"] = _mean(rated)
        if name in functions:
            metrics[f"eval/{column}/none"] = float(len(values) - len(rated))
        least = least_of(name, values, config.passes, functions - rewards.penalties)
        if least is None:
            continue
        n = config.samples
        by_prompt = {rows[i]["index"]: values[i : i + n] for i in range(0, len(rows), n)}
        for k, share in passes(by_prompt, least, n).items():
            metrics[f"eval/{column}/pass_at_{k}"] = share
    return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _std(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).std(correction=0).item()
