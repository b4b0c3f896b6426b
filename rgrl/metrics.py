"""The metrics of a step, each explained in `METRICS`; the functions that compute them are collective."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from rgrl.algo.advantages import zero_spread
from rgrl.algo.corrections import correction, effective_sample_size, log_ratio
from rgrl.config import Config
from rgrl.distributed import fraction, quantiles, total
from rgrl.rewards.bridge import NAMES, SPECIAL, TEXT_KINDS, Coverage
from rgrl.rollout.denoise import DenoiseStats
from rgrl.types import Rollout, masked_mean


class Clock:
    """Seconds spent in each phase of a step, as `time/NAME`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the body's wall clock to `time/NAME`, once the GPU has finished it."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        key = f"time/{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


def rollout_metrics(
    accelerator: Accelerator,
    rollout: Rollout,
    is_end: Callable[[Tensor], Tensor],
    reward_B: Tensor,
    terms: dict[str, Tensor],
    G: int,
) -> dict[str, float]:
    """Rewards and lengths over all ranks. `terms` are the reward's terms by name, each r_B; NaN is no reward."""
    mask_BC = rollout.completion_mask_BC
    length_B = mask_BC.sum(1).float()
    clipped_B = ~is_end(rollout.completion_BC).any(1)
    all_B = accelerator.gather(reward_B.to(accelerator.device))
    lengths_B = accelerator.gather(length_B)
    metrics = {
        "reward": all_B.nanmean().item(),
        "reward_std": _std_in_groups(all_B.view(-1, G)),
        "frac_reward_zero_std": zero_spread(all_B, G).float().mean().item(),
        "completions/mean_length": lengths_B.mean().item(),
        "completions/min_length": lengths_B.min().item(),
        "completions/max_length": lengths_B.max().item(),
        "completions/clipped_ratio": accelerator.gather(clipped_B.float()).mean().item(),
    }
    for name, term_B in terms.items():
        everywhere_B = accelerator.gather(term_B.to(accelerator.device))
        rated_B = everywhere_B[~everywhere_B.isnan()]
        metrics[f"rewards/{name}/mean"] = rated_B.mean().item()
        metrics[f"rewards/{name}/std"] = rated_B.std(correction=0).item() if len(rated_B) else math.nan
    return metrics


def _std_in_groups(reward_PG: Tensor) -> float:
    """The mean over groups of the standard deviation within, of what has a reward; NaN where nothing has."""
    std_P = reward_PG.std(1, correction=0)
    for p in reward_PG.isnan().any(1).nonzero()[:, 0].tolist():
        rated_G = reward_PG[p][~reward_PG[p].isnan()]
        std_P[p] = rated_G.std(correction=0) if len(rated_G) else float("nan")
    return std_P.nanmean().item()


def bridge_metrics(
    accelerator: Accelerator, rollout: Rollout, is_end: Callable[[Tensor], Tensor], coverage: Coverage
) -> dict[str, float]:
    """How the guide is shown the text tokens of a rollout, up to the first end token, and of the vocabulary."""
    token_BC = rollout.completion_BC
    kind_BC = coverage.kind_V.to(token_BC.device)[token_BC]
    text_BC = (is_end(token_BC).cumsum(1) == 0) & (kind_BC != SPECIAL)
    vocabulary = coverage.counts()
    metrics, every = {}, max(1.0, total(accelerator, text_BC.sum().float()))
    for kind, name in zip(TEXT_KINDS, NAMES, strict=False):
        metrics[f"bridge/{name}"] = total(accelerator, (text_BC & (kind_BC == kind)).sum().float()) / every
        metrics[f"bridge/vocabulary/{name}"] = float(vocabulary[name])
    return metrics


def guidance_metrics(
    accelerator: Accelerator, config: Config, rollout: Rollout, stats: DenoiseStats
) -> dict[str, float]:
    """What guidance did to a rollout, and how far apart policy and guided sampler are, over all ranks."""
    decided_BC = rollout.decided_BC
    log_c_BC = log_ratio(rollout, "token")
    inside_BC = decided_BC & log_c_BC.isfinite()
    inside = max(1.0, total(accelerator, inside_BC.sum().float()))
    c_B = accelerator.gather(log_ratio(rollout, "sequence").exp())
    weight_B = accelerator.gather(masked_mean(correction(rollout, config.objective), decided_BC))
    metrics = {
        "guidance/changed": fraction(accelerator, stats.changed, stats.guided),
        "guidance/broken": total(accelerator, sum(stats.broken, torch.zeros(()))),
        "guidance/delta_logp": -total(accelerator, torch.where(inside_BC, log_c_BC, 0.0).sum()) / inside,
        "guidance/outside_support": 1 - inside / total(accelerator, decided_BC.sum().float()),
        "correction/mean": weight_B.mean().item(),
        "correction/ess_full": effective_sample_size(c_B).item(),
        "correction/ess": effective_sample_size(weight_B).item(),
    }
    metrics |= quantiles(accelerator, "correction/token", log_c_BC[decided_BC].exp())
    metrics |= quantiles(accelerator, "correction/sequence_log", log_ratio(rollout, "sequence").clamp(min=-1e3))
    for quarter, pairs in stats.weight.items():  # all four on every rank, whether or not its rows got that far
        hidden = total(accelerator, torch.tensor(float(sum(n for _, n in pairs))))
        weight = total(accelerator, torch.stack([w for w, _ in pairs]).sum() if pairs else torch.zeros(()))
        if hidden > 0:
            metrics[f"guidance/entropy_weight/q{quarter}"] = weight / hidden
    return metrics


METRICS = {
    "reward": "mean total reward of the rollouts that trained this step (guided, if guidance is on)",
    "reward_std": "mean over groups of the standard deviation of total reward within the group",
    "rewards/<name>/mean": "mean of one reward term as it is paid (`clip`, `only_if`), unweighted",
    "rewards/<name>/std": "standard deviation of that term over all rows",
    "rewards/<name>/failed": "calls of a Python reward that raised or took too long, on all ranks, evaluation included",
    "rewards/<name>/none": "completions that a Python reward or verifier gave None, no reward, on all ranks, "
    "evaluation included; mean and std of this term leave them out",
    "rewards/<name>/cut": "texts too long for the reward model (`reward.max_length`), which were shown without the "
    "beginning of their prompt, on all ranks, evaluation included",
    "frac_reward_zero_std": "fraction of groups whose rewards are all equal; they contribute nothing",
    "completions/mean_length": "mean tokens up to and including the first end token",
    "completions/min_length": "the shortest row, in tokens",
    "completions/max_length": "the longest row, in tokens",
    "completions/clipped_ratio": "fraction of rows without an end token",
    "kl": "KL(policy || base), nats per token: the k3 estimate, or over the whole vocabulary (`objective.kl`)",
    "gradient/reward": "mean reward of blends of expected and written embeddings, by the model whose gradient trains",
    "gradient/kl": "mean KL(policy || base) over the whole vocabulary at the hidden positions of those states, nats",
    "gradient/entropy_weight": "mean entropy weight w at the positions with an expected embedding",
    "gradient/outside": "fraction of those positions whose written token is outside the policy's top-p/top-k support",
    "gradient/broken": "fraction of those positions whose gradient was not finite, and was not used",
    "grad_norm/objective": "norm of the weighted gradient of the objective alone, where there are two terms",
    "grad_norm/gradient": "norm of that of the reward's own gradient (`gradient.weight`)",
    "clip_ratio/low": "grpo: fraction of tokens whose ratio was clipped from below",
    "clip_ratio/high": "grpo: fraction of tokens whose ratio was clipped from above",
    "ratio": "grpo: mean of exp(l - l_old), per token or per row; exactly 1 at the first update of a rollout",
    "ratio/p05": "its 5 % quantile; with ratio/p50 and ratio/p95 it shows how far the updates on a rollout went",
    "ratio/p50": "its median",
    "ratio/p95": "its 95 % quantile",
    "entropy": "mean entropy of the policy's sampling distribution where tokens were committed, nats",
    "loss": "loss of the last update of this step",
    "grad_norm": "global norm of the gradient before clipping, last update",
    "grad_norm_clipped": "the same after clipping",
    "learning_rate": "rate used by the last update",
    "update/skipped": "updates of this step skipped for a loss or gradient that was not finite",
    "num_tokens": "completion tokens rolled out since the start of the run",
    "guidance/changed": "fraction of tokens committed by guided steps where guidance changed the most likely token",
    "guidance/broken": "gradients of the reward, one a hidden position, that were not finite and were not used",
    "guidance/delta_logp": "mean log-probability under the guided minus under the policy's distribution, nats, "
    "over all rows, also those that `guidance.share` leaves unguided",
    "guidance/outside_support": "fraction of committed tokens outside the policy's top-p/top-k support",
    "guidance/retokenised": "fraction of completions that are scored as other tokens than the guide was shown",
    "bridge/exact": "fraction of sampled text tokens that the guide's tokenizer has as well, for the same bytes",
    "bridge/composed": "fraction that it spells with several tokens, whose mean embedding the guide is shown",
    "bridge/unmatched": "fraction of which the guide is shown nothing, or its unknown token, as `reward.bridge` sets",
    "bridge/vocabulary/exact": "tokens of the policy's vocabulary that the guide's tokenizer has as well",
    "bridge/vocabulary/composed": "tokens that it spells with several",
    "bridge/vocabulary/unmatched": "tokens that it is shown nothing of, or its unknown token",
    "guidance/eta": "step size of guidance in this step",
    "guidance/entropy_weight/q1": "mean entropy weight w of hidden positions, first quarter of the denoising steps",
    "guidance/entropy_weight/q2": "the same in the second quarter",
    "guidance/entropy_weight/q3": "the same in the third",
    "guidance/entropy_weight/q4": "the same in the last",
    "guidance/reward_before": "mean reward of unguided completions of the first guidance.probe_prompts eval prompts",
    "guidance/reward_after": "the same with guidance and the same random numbers",
    "correction/mean": "mean importance weight of a row, as `objective.correction` computes it",
    "correction/ess": "effective sample size of those weights as a fraction of the rows, 0 ... 1",
    "correction/ess_full": "the same for the full, untruncated product of c over each row",
    "correction/token/p05": "5 % quantile of c of single tokens, policy over guided probability",
    "correction/token/p50": "median of it",
    "correction/token/p95": "95 % quantile of it",
    "correction/sequence_log/p05": "5 % quantile of the logarithm of the product of c over a row",
    "correction/sequence_log/p50": "median of it",
    "correction/sequence_log/p95": "95 % quantile of it",
    "eval/reward": "mean reward of unguided completions of the eval prompts",
    "eval/reward_std": "its standard deviation over samples",
    "eval/rewards/<name>/mean": "mean of one reward term over those completions, unweighted, of what is not None",
    "eval/rewards/<name>/none": "completions that a Python reward or verifier gave None, no reward",
    "eval/rewards/<name>/pass_at_<k>": "pass@k: how probably one or more of k completions of a prompt pass this term "
    "(`eval.passes`), mean over prompts, estimated without bias from all `eval.samples` of each: for k = 1 the "
    "fraction of completions that pass, for the largest k that of prompts with one that does",
    "eval/judge": "the same under the judge, which is never trained against",
    "eval/judge_std": "its standard deviation over samples",
    "eval/judge_cut": "texts that were too long for the judge, and lost the beginning of their prompt",
    "eval/distinct_1": "distinct words divided by all words, over all eval completions",
    "eval/distinct_2": "the same of pairs of neighbouring words; like the last, only sets of like size compare",
    "eval/top_word": "the largest fraction of eval completions that hold one content word; which word is in the column "
    "`top_word` of their table, in the rows that hold it (`top_word` in rgrl/evaluation/guards.py)",
    "eval/empty": "fraction of eval completions without any text",
    "eval/base_nll": "nats per token of those completions under the frozen base, at mask rates .25, .5, .75",
    "eval/kl": "their log-likelihood under the policy minus under the base, nats per token, at the same masks",
    "eval/length": "mean tokens of those completions",
    "hacking/alarm": "1 where this evaluation looks like reward hacking, else 0: the reward has risen while judge or "
    "diversity has fallen, each by more than its noise (docs/hacking.md)",
    "hacking/reward": "change of eval/reward since the first evaluation, in standard errors, paired by prompt",
    "hacking/judge": "the same of eval/judge",
    "hacking/distinct_2": "the same of eval/distinct_2",
    "hacking/top_word": "the same of eval/top_word",
    "step_time": "seconds of wall clock for the step, evaluation included",
    "time/rollout": "seconds of denoising, guided or not",
    "time/reward": "seconds of decoding and scoring",
    "time/update": "seconds of log-probabilities, gradients and optimizer",
    "time/eval": "seconds of evaluation",
    "time/checkpoint": "seconds that saving delayed the run after the previous step; writing goes on in the background",
}
TIMING = ("step_time", "time/")  # the metrics that two identical runs may differ in
