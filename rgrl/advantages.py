"""Rewards to advantages, within each group of G completions of one prompt. Rows of a group stand together."""

from collections.abc import Callable

import torch
from torch import Tensor

SPREAD = 1e-6  # a group whose rewards differ by less than this has nothing to teach


def _groups(reward_B: Tensor, G: int) -> Tensor:
    return reward_B.view(-1, G)


def zero_spread(reward_B: Tensor, G: int) -> Tensor:
    """True for each group (P) whose rewards are all the same."""
    reward_PG = _groups(reward_B, G)
    return (reward_PG.amax(1) - reward_PG.amin(1)) < SPREAD


def centred(reward_B: Tensor, G: int) -> Tensor:
    """A = r - mean of the group."""
    reward_PG = _groups(reward_B, G)
    return _silence(reward_PG - reward_PG.mean(1, keepdim=True), reward_B, G)


def zscore(reward_B: Tensor, G: int) -> Tensor:
    """A = (r - mean) / standard deviation of the group (GRPO, arXiv 2402.03300, section 4.1.2)."""
    reward_PG = _groups(reward_B, G)
    deviation_P1 = reward_PG.std(1, keepdim=True)
    return _silence((reward_PG - reward_PG.mean(1, keepdim=True)) / (deviation_P1 + 1e-4), reward_B, G)


def leave_one_out(reward_B: Tensor, G: int) -> Tensor:
    """A = r - mean of the others in the group (RLOO, arXiv 2402.14740, section 3.1)."""
    reward_PG = _groups(reward_B, G)
    return _silence((reward_PG - reward_PG.mean(1, keepdim=True)) * (G / (G - 1)), reward_B, G)


def _silence(advantage_PG: Tensor, reward_B: Tensor, G: int) -> Tensor:
    return torch.where(zero_spread(reward_B, G)[:, None], 0.0, advantage_PG).reshape(-1)


ADVANTAGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "centred": centred,
    "zscore": zscore,
    "leave_one_out": leave_one_out,
}
