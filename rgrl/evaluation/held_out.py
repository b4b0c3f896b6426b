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
from rgrl.config import Config
from rgrl.evaluation import Evaluation, Generate
from rgrl.evaluation.guards import distinct, empty, top_word
from rgrl.models import Policy
from rgrl.rewards import ClassifierReward, Rewards
from rgrl.rollout import Guidance
from rgrl.seeds import generators
from rgrl.types import Prompts, Rollout


@dataclass
class Gathered:
    """What this rank has measured so far."""

    # float64: negative log-likelihood under the base, number of tokens, the first under the policy; texts that were too
    # long for the judge
    sums_4: Tensor
    rows: list[dict[str, Any]] = field(default_factory=list)
    guided: dict[int, float | None] = field(default_factory=dict)  # reward if guided, by number of the prompt


@dataclass
class HeldOut:
    """One unguided completion per prompt, always with the same random numbers.

    Where `guidance_at` gives guidance for a step, the first `guidance.probe_prompts` prompts are also completed with it
    and those random numbers, to measure what guidance is worth. None of that enters `eval/*`.
    """

    config: Config
    accelerator: Accelerator
    policy: Policy
    rewards: Rewards
    judge: ClassifierReward | None
    prompts: Prompts
    guidance_at: Callable[[int], Guidance | None]
    tell: Callable[[str], None]  # shows a few words beside the bar
    name: str = "eval"

    def __call__(self, generate: Generate, step: int) -> Evaluation:
        """The evaluation, over all ranks."""
        guidance, policy, total = self.guidance_at(step), self.policy, len(self.prompts)
        mine = range(self.accelerator.process_index, total, self.accelerator.num_processes)
        rollout = self.config.rollout
        size = rollout.micro_batch or max(8, self.config.run.prompts_per_device * rollout.num_generations)
        gathered = Gathered(torch.zeros(4, device=policy.device, dtype=torch.float64))
        with policy.forward_passes():
            for start in range(0, len(mine), size):
                self.tell(f"evaluating {start * self.accelerator.num_processes}/{total}")
                self._unguided(generate, list(mine[start : start + size]), gathered)
                probe = [i for i in mine[start : start + size] if i < self.config.guidance.probe_prompts]
                if guidance is not None and probe:
                    prompts = self.prompts.take(probe)
                    steered = generate(prompts, probe, guidance)
                    total_B, _ = self.rewards.score(prompts, policy.decode(steered.completion_BC))
                    gathered.guided |= dict(zip(probe, _or_none(total_B), strict=True))
        return self._over_all_ranks(gathered)

    def _unguided(self, generate: Generate, numbers: list[int], gathered: Gathered) -> None:
        """Add completions of the prompts with these numbers, their scores and their likelihoods."""
        prompts = self.prompts.take(numbers)
        rollout = generate(prompts, numbers)
        completions = self.policy.decode(rollout.completion_BC)
        total_B, _ = self.rewards.score(prompts, completions)
        judged: list[float] | list[None] = [None] * len(prompts)
        if self.judge is not None:
            self.judge.frame.cut = 0
            judged = self.judge.score(prompts, completions).tolist()
            gathered.sums_4[3] += self.judge.frame.cut
        own, _ = self._masked_nll(rollout, numbers)
        with self.policy.reference():
            base = self._masked_nll(rollout, numbers)
        gathered.sums_4[:3] += torch.stack([*base, own]).double()
        lengths = rollout.completion_mask_BC.sum(1).tolist()
        for i, prompt, text, r, j, n in zip(
            numbers, prompts.texts, completions, _or_none(total_B), judged, lengths, strict=True
        ):
            gathered.rows.append(
                {"index": i, "prompt": prompt, "completion": text, "reward": r, "judge": j, "length": n}
            )

    def _masked_nll(self, rollout: Rollout, numbers: list[int]) -> tuple[Tensor, Tensor]:
        seeds = generators(self.config.run.seed, 0, numbers, "base_nll")
        return masked_nll(self.policy.logp, rollout, seeds, self.policy.mask_id)

    def _over_all_ranks(self, gathered: Gathered) -> Evaluation:
        rows = sorted(gather_object(gathered.rows), key=lambda row: row["index"])
        guided = dict(gather_object(list(gathered.guided.items())))
        base_nll, count, own_nll, cut = self.accelerator.reduce(gathered.sums_4, "sum").tolist()
        reward = [row["reward"] for row in rows if row["reward"] is not None]
        texts = [row["completion"] for row in rows]
        word, held = top_word([row["prompt"] for row in rows], texts)
        for row, holds in zip(rows, held, strict=True):
            row["top_word"] = word if holds else None
        metrics = {
            "eval/reward": _mean(reward),
            "eval/reward_std": _std(reward),
            "eval/distinct_1": distinct(texts, 1),
            "eval/distinct_2": distinct(texts, 2),
            "eval/top_word": sum(held) / len(rows),
            "eval/empty": empty(texts),
            "eval/base_nll": base_nll / max(count, 1.0),
            "eval/kl": (base_nll - own_nll) / max(count, 1.0),
            "eval/length": _mean([row["length"] for row in rows]),
        }
        if guided:
            pairs = [(row["reward"], guided[row["index"]]) for row in rows if row["index"] in guided]
            both = [(before, after) for before, after in pairs if before is not None and after is not None]
            metrics["guidance/reward_before"] = _mean([before for before, _ in both])
            metrics["guidance/reward_after"] = _mean([after for _, after in both])
        if self.judge is not None:
            metrics["eval/judge"] = _mean([row["judge"] for row in rows])
            metrics["eval/judge_std"] = _std([row["judge"] for row in rows])
            metrics["eval/judge_cut"] = cut
        return Evaluation(metrics, [row | self._chat(row["index"]) for row in rows])

    def _chat(self, i: int) -> dict[str, str | None]:
        """What a judge is shown of prompt `i`, as JSON, where some prompts are chats of several turns."""
        chats = self.prompts.chats
        if all(isinstance(chat, str) for chat in chats):
            return {}
        return {"chat": None if isinstance(chats[i], str) else json.dumps(chats[i], ensure_ascii=False)}


def _or_none(reward_B: Tensor) -> list[float | None]:
    """Rewards as numbers, None where there is no reward (NaN)."""
    return [None if math.isnan(r) else r for r in reward_B.tolist()]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _std(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).std(correction=0).item()
