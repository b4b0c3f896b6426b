"""How well a reward model or judge tells liked from disliked and real from broken text, on held-out snippets."""

import random
from collections.abc import Callable

import corpus
import torch
from broken import KINDS
from encoder import Cut, random_cut
from torch import Tensor

Score = Callable[[list[Cut]], list[float]]
BROKEN = 400  # snippets that are compared with broken ones: a share is known to 0.025


def held_out_cuts(movies: list[corpus.Snippet]) -> list[Cut]:
    rng = random.Random(7)
    return [random_cut(rng, s.text) for s in movies]


def held_out_figures(
    score: Score, movies: list[corpus.Snippet], samples: list[Cut], lexicon: dict[str, float]
) -> dict[str, float]:
    """Pair accuracy (ratings more than a point apart), correlation, and the share of real text above broken text.

    A snippet is compared with a broken one of its own words (the first BROKEN of them), and with the policy's sample of
    its own opening.
    """
    real = held_out_cuts(movies)
    score_B, rating_B = torch.tensor(score(real)), torch.tensor([s.rating for s in movies])
    apart_BB = rating_B[:, None] - rating_B[None, :] > 1
    right = (score_B[:, None] > score_B[None, :])[apart_BB].float().mean()
    figures = {"pair_accuracy": float(right), "correlation": correlation(score_B, rating_B)}
    rng, above = random.Random(8), []
    for name, kinds in KINDS.items():
        for kind in kinds:
            broken = [random_cut(rng, kind(rng, s.text, rng.choice(movies).text, lexicon)) for s in movies[:BROKEN]]
            above.append(float((score_B[: len(broken)] > torch.tensor(score(broken))).float().mean()))
            figures[f"real_over_{name}/{kind.__name__}"] = above[-1]
    figures["real_over_broken"] = sum(above) / len(above)
    n = min(len(samples), len(real))
    figures["real_over_policy_samples"] = float((score_B[:n] > torch.tensor(score(samples[:n]))).float().mean())
    return {name: round(value, 3) for name, value in figures.items()}


def correlation(a_B: Tensor, b_B: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a_B, b_B]))[0, 1])


def shared_errors(scores: dict[str, Score], movies: list[corpus.Snippet], samples: list[Cut]) -> dict[str, float]:
    """How far two models err alike: the correlation of what is left of their scores after the human rating.

    On held-out snippets by linear regression on the rating; on the policy's samples, which nobody rated, of the scores
    themselves.
    """
    rating_B = torch.tensor([s.rating for s in movies])
    left, told = {}, {}
    for name, score in scores.items():
        score_B = torch.tensor(score(held_out_cuts(movies)))
        slope = correlation(score_B, rating_B) * score_B.std() / rating_B.std()
        left[name] = score_B - slope * rating_B
        told[name] = torch.tensor(score(samples))
    names = list(scores)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    found = {f"errors/{a}/{b}": correlation(left[a], left[b]) for a, b in pairs}
    found |= {f"samples/{a}/{b}": correlation(told[a], told[b]) for a, b in pairs}
    return {name: round(value, 3) for name, value in found.items()}
