"""The numbers that count: unguided completions of held-out prompts, under the reward, the judge and the base."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rgrl.config import Config
from rgrl.denoise import RolloutNoise, denoise
from rgrl.guidance import Guide
from rgrl.logprobs import masked_nll
from rgrl.models import Policy
from rgrl.rewards import ClassifierReward, Rewards
from rgrl.seeds import generators
from rgrl.types import Prompts, Rollout


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
    guide_for: Callable[[Prompts], Guide | None] | None = None,
) -> Evaluation:
    """One unguided completion per prompt, always with the same random numbers. Collective: all ranks call it.

    With `guide_for` the first `guidance.probe_prompts` prompts are also completed with guidance and those random
    numbers, to tell what guidance is worth; nothing of that enters `eval/*`.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    settings = config.rollout
    index = list(range(rank, len(prompts), ranks))
    rows: list[dict[str, Any]] = []
    nll = torch.zeros(3, device=policy.device, dtype=torch.float64)
    guided: dict[int, float] = {}

    def complete(chosen: list[int], mine: Prompts, guidance: Guide | None) -> Rollout:
        prompt_BL, attention_BL = policy.encode_prompts(mine.texts, config.data.max_prompt_length)
        noise = RolloutNoise.draw(
            generators(config.run.seed, 0, chosen, "eval"),
            settings.steps,
            settings.max_completion_length,
            guidance.config.steps if guidance is not None else 0,
        )
        mask_id, is_end = policy.mask_id, policy.is_end
        return denoise(policy.logits, prompt_BL, attention_BL, mask_id, is_end, settings, noise, guidance)

    size = settings.micro_batch or max(8, config.run.prompts_per_device * config.rollout.num_generations)
    with policy.in_step():
        for start in range(0, len(index), size):
            chosen = index[start : start + size]
            mine = prompts.take(chosen)
            rollout = complete(chosen, mine, None)
            completions = policy.decode(rollout.completion_BC)
            total_B, _ = rewards.score(mine, completions)
            judged = judge.score(mine, completions).tolist() if judge is not None else [None] * len(mine)
            seeds = generators(config.run.seed, 0, chosen, "base_nll")
            own, _ = masked_nll(policy.logp, rollout, seeds, policy.mask_id)
            with policy.reference():
                seeds = generators(config.run.seed, 0, chosen, "base_nll")
                nll += torch.stack([*masked_nll(policy.logp, rollout, seeds, policy.mask_id), own]).double()
            lengths = rollout.completion_mask_BC.sum(1).tolist()
            for i, prompt, text, r, j, n in zip(
                chosen, mine.texts, completions, total_B.tolist(), judged, lengths, strict=True
            ):
                rows.append({"index": i, "prompt": prompt, "completion": text, "reward": r, "judge": j, "length": n})
            probe = [i for i in chosen if i < config.guidance.probe_prompts]
            if guide_for is not None and probe:
                mine = prompts.take(probe)
                steered = complete(probe, mine, guide_for(mine))
                total_B, _ = rewards.score(mine, policy.decode(steered.completion_BC))
                guided |= dict(zip(probe, total_B.tolist(), strict=True))
    rows = sorted(gather_object(rows), key=lambda row: row["index"])
    guided = dict(gather_object(list(guided.items())))
    total_nll, count, own_nll = accelerator.reduce(nll, "sum").tolist()
    metrics = {
        "eval/reward": _mean([row["reward"] for row in rows]),
        "eval/reward_std": _std([row["reward"] for row in rows]),
        "eval/distinct_2": distinct_2([row["completion"] for row in rows]),
        "eval/base_nll": total_nll / max(count, 1.0),
        "eval/kl": (total_nll - own_nll) / max(count, 1.0),
        "eval/length": _mean([row["length"] for row in rows]),
    }
    if guided:
        metrics["guidance/reward_before"] = _mean([row["reward"] for row in rows if row["index"] in guided])
        metrics["guidance/reward_after"] = _mean(list(guided.values()))
    if judge is not None:
        metrics["eval/judge"] = _mean([row["judge"] for row in rows])
        metrics["eval/judge_std"] = _std([row["judge"] for row in rows])
    return Evaluation(metrics, rows)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _std(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).std(correction=0).item()
