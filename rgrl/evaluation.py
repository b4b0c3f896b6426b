"""The numbers that count: unguided completions of held-out prompts, under the reward, the judge and the base."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rgrl.config import Config
from rgrl.denoise import RolloutNoise, denoise
from rgrl.logprobs import masked_nll
from rgrl.models import Policy
from rgrl.rewards import ClassifierReward, Rewards
from rgrl.seeds import generators
from rgrl.types import Prompts


@dataclass(frozen=True)
class Evaluation:
    """Metrics over all eval prompts, and one row per completion."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def distinct_2(texts: list[str]) -> float:
    """Distinct word pairs over all word pairs of a set of texts (Li et al. 2016, arXiv 1510.03055); 0 if none."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def evaluate(
    config: Config,
    accelerator: Accelerator,
    policy: Policy,
    rewards: Rewards,
    judge: ClassifierReward | None,
    prompts: Prompts,
) -> Evaluation:
    """One unguided completion per prompt, always with the same random numbers. Collective: all ranks call it."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    settings = config.rollout
    index = list(range(rank, len(prompts), ranks))
    rows: list[dict[str, Any]] = []
    nll = torch.zeros(2, device=policy.device, dtype=torch.float64)
    size = settings.micro_batch or max(8, config.run.prompts_per_device * config.rollout.num_generations)
    with policy.in_step():
        for start in range(0, len(index), size):
            chosen = index[start : start + size]
            mine = Prompts([prompts.texts[i] for i in chosen], [prompts.rows[i] for i in chosen])
            prompt_BL, attention_BL = policy.encode_prompts(mine.texts, config.data.max_prompt_length)
            rollout = denoise(
                policy.logits,
                prompt_BL,
                attention_BL,
                policy.mask_id,
                policy.is_end,
                settings,
                RolloutNoise.draw(
                    generators(config.run.seed, 0, chosen, "eval"), settings.steps, settings.max_completion_length, 0
                ),
            )
            completions = policy.decode(rollout.completion_BC)
            total_B, _ = rewards.score(mine, completions)
            judged = judge.score(mine, completions).tolist() if judge is not None else [None] * len(mine)
            with policy.reference():
                noise = generators(config.run.seed, 0, chosen, "base_nll")
                nll += torch.stack(masked_nll(policy.logp, rollout, noise, policy.mask_id)).double()
            lengths = rollout.completion_mask_BC.sum(1).tolist()
            for i, prompt, text, r, j, n in zip(
                chosen, mine.texts, completions, total_B.tolist(), judged, lengths, strict=True
            ):
                rows.append({"index": i, "prompt": prompt, "completion": text, "reward": r, "judge": j, "length": n})
    rows = sorted(gather_object(rows), key=lambda row: row["index"])
    total_nll, count = accelerator.reduce(nll, "sum").tolist()
    metrics = {
        "eval/reward": _mean([row["reward"] for row in rows]),
        "eval/reward_std": _std([row["reward"] for row in rows]),
        "eval/distinct_2": distinct_2([row["completion"] for row in rows]),
        "eval/base_nll": total_nll / max(count, 1.0),
        "eval/length": _mean([row["length"] for row in rows]),
    }
    if judge is not None:
        metrics["eval/judge"] = _mean([row["judge"] for row in rows])
        metrics["eval/judge_std"] = _std([row["judge"] for row in rows])
    return Evaluation(metrics, rows)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _std(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).std(correction=0).item()
