"""Whether a reward model scores and guides as its own forward pass does, found out by trying when it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rgrl.errors import ConfigError
from rgrl.rewards.frame import Framed
from rgrl.types import Prompts

if TYPE_CHECKING:
    from rgrl.rewards.classifier import ClassifierReward

PROMPTS = ["Hello", "Tell me at some length, please, what the second of these two prompts is about; it is longer."]
COMPLETIONS = [" one", " of two answers, the longer one"]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}  # of the score, or of 1 if it is less

# What architectures raise that were not made for what is asked of them.
WHAT_A_MODEL_RAISES = (TypeError, ValueError, NotImplementedError, RuntimeError, AttributeError, IndexError, KeyError)


def probe(reward: ClassifierReward) -> None:
    """Try the ways to guide and keep the first that is exact. Raises `ConfigError` if not even scores are.

    The truth is the model's own forward pass on the token ids of one text at a time. It must be what `score` gives for
    a batch of texts of different lengths. Guiding, one text at a time and in a batch, must be the same for the tokens
    of the same frames, given as embeddings.
    """
    _probe(reward)
    reward.frame.cut = 0


@torch.no_grad()
def _probe(reward: ClassifierReward) -> None:
    prompts = Prompts(PROMPTS, [{}, {}])
    try:
        rows = [reward.frame.framed(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        truth_B = torch.stack([reward.forward_alone(row) for row in rows])
        scores_B = reward.score(prompts, COMPLETIONS)
    except WHAT_A_MODEL_RAISES as error:
        raise ConfigError(f"reward model {reward.name} cannot score: {_told(error)}") from error
    if not truth_B.isfinite().all():
        raise ConfigError(
            f"reward model {reward.name} scores a plain text {truth_B[0]:.3g}: its weights are not all finite"
        )
    if (wrong := _distance(reward, scores_B, truth_B)) is not None:
        raise ConfigError(
            f"reward model {reward.name} cannot score: it gives a text another score in a batch than alone, {wrong}"
        )
    for way in reward.ways:
        try:
            problem = _guiding_error(reward, way, prompts)
        except WHAT_A_MODEL_RAISES as error:
            problem = _told(error)
        if problem is None:
            reward.way = way
            return
        reward.reasons[way] = problem


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _guiding_error(reward: ClassifierReward, way: str, prompts: Prompts) -> str | None:
    table_UD, truth = reward.embedding_table(), []
    rows = [reward.tokenise(completion) for completion in COMPLETIONS]
    C = max(map(len, rows)) + 1
    response_BCD = table_UD.new_zeros(len(rows), C, table_UD.shape[1])
    shown_BC = torch.zeros(len(rows), C, dtype=torch.bool, device=reward.device)
    for b, (prompt, ids) in enumerate(zip(PROMPTS, rows, strict=True)):
        before, after = reward.frame.around(prompt)
        own = Framed(ids, [reward.frame.answer_type()] * len(ids))
        truth.append(reward.forward_alone(before + own + after))
        response_BCD[b, : len(ids)] = table_UD[torch.tensor(ids, device=reward.device)]
        shown_BC[b, : len(ids)] = True
    truth_B = torch.stack(truth)
    for batch in ([0], [1], [0, 1]):
        at_B = torch.tensor(batch, device=reward.device)
        guided = reward.for_prompts(prompts.take(batch), way)
        r_B = guided(response_BCD[at_B], shown_BC[at_B], torch.arange(len(batch), device=reward.device))
        if (wrong := _distance(reward, r_B, truth_B[at_B])) is not None:
            return wrong
    return None


def _distance(reward: ClassifierReward, r_B: torch.Tensor, truth_B: torch.Tensor) -> str | None:
    tolerance = TOLERANCE[next(reward.model.parameters()).dtype] * truth_B.abs().clamp(min=1.0)
    apart_B = (r_B - truth_B).abs()
    if bool((apart_B <= tolerance).all()):  # false for NaN
        return None
    worst = int(torch.nan_to_num(apart_B, nan=float("inf")).argmax())
    return f"{float(r_B[worst]):.6g} instead of {float(truth_B[worst]):.6g}"
