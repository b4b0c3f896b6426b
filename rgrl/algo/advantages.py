"""Rewards to advantages, within each group of G completions of one prompt. Rows of a group stand together.

Each is called as `advantage(reward_B, G, config)`; a group with zero spread contributes nothing. One of your own is
named by dotted path, `objective.advantage: "my_advantage:ranked"`, and reads settings of its own in `config.settings`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rgrl.config import ObjectiveConfig

Advantage = Callable[[Tensor, int, ObjectiveConfig], Tensor]
SPREAD = 1e-6  # a group whose rewards differ by no more than this, as a fraction of the largest, contributes nothing


def _groups(reward_B: Tensor, G: int) -> Tensor:
    return reward_B.view(-1, G)


def zero_spread(reward_B: Tensor, G: int) -> Tensor:
    """True for each group (P) whose rewards are all the same; completions without a reward (NaN) do not count.

    The same to within float32's rounding, which grows with the rewards.
    """
    reward_PG = _groups(reward_B, G)
    spread_P = reward_PG.nan_to_num(nan=float("-inf")).amax(1) - reward_PG.nan_to_num(nan=float("inf")).amin(1)
    return spread_P <= SPREAD * reward_PG.nan_to_num(nan=0.0).abs().amax(1)


def in_groups(advantage: Advantage, reward_B: Tensor, G: int, config: ObjectiveConfig) -> Tensor:
    """`advantage` of groups in which some completions may have no reward (NaN): A_B, float32.

    Those get 0, and the others what they would get in a smaller group without them; a group with fewer than two rewards
    contributes nothing, and so does every group where G is 1.
    """
    rated_PG = ~_groups(reward_B, G).isnan()
    advantage_PG = torch.zeros(rated_PG.shape, device=reward_B.device)
    for n in range(2, G + 1):
        chosen_PG = rated_PG & (rated_PG.sum(1, keepdim=True) == n)
        if chosen_PG.any():
            found_B = advantage(_groups(reward_B, G)[chosen_PG], n, config)  # a copy: user code may write into it
            advantage_PG = advantage_PG.masked_scatter(chosen_PG, found_B.float())
    return advantage_PG.reshape(-1)


def centred(reward_B: Tensor, G: int, config: ObjectiveConfig) -> Tensor:
    """A = r - mean of the group."""
    reward_PG = _groups(reward_B, G)
    return _silence(reward_PG - reward_PG.mean(1, keepdim=True), reward_B, G)


def zscore(reward_B: Tensor, G: int, config: ObjectiveConfig) -> Tensor:
    """A = (r - mean) / standard deviation of the group (GRPO, arXiv 2402.03300, section 4.1.2)."""
    reward_PG = _groups(reward_B, G)
    deviation_P1 = reward_PG.std(1, keepdim=True)
    return _silence((reward_PG - reward_PG.mean(1, keepdim=True)) / (deviation_P1 + 1e-4), reward_B, G)


def leave_one_out(reward_B: Tensor, G: int, config: ObjectiveConfig) -> Tensor:
    """A = r - mean of the others in the group (RLOO, arXiv 2402.14740, section 3.1)."""
    reward_PG = _groups(reward_B, G)
    return _silence((reward_PG - reward_PG.mean(1, keepdim=True)) * (G / (G - 1)), reward_B, G)


def reward_weighted(reward_B: Tensor, G: int, config: ObjectiveConfig) -> Tensor:
    """A = G softmax(r / beta) within the group, beta = `config.weight_temperature` in units of the reward; sums to G.

    For the objective `weighted`: reward-weighted regression (Peters and Schaal 2007).
    """
    return _silence(G * (_groups(reward_B, G) / config.weight_temperature).softmax(1), reward_B, G)


def tilted(reward_B: Tensor, G: int, config: ObjectiveConfig) -> Tensor:
    """A = G softmax(r / beta) - 1 within the group, beta = `config.weight_temperature`: a tilt minus its baseline.

    For the objectives `dmpo` and `tilt_matching`.
    """
    return _silence(G * (_groups(reward_B, G) / config.weight_temperature).softmax(1) - 1, reward_B, G)


def wd1(reward_B: Tensor, G: int, config: ObjectiveConfig) -> Tensor:
    """A = G (softmax(psi a) - softmax(-psi a)) of the centred reward a, psi = 1 / `config.weight_temperature`.

    For the objective `wd1` (arXiv 2507.08838).
    """
    a_PG = (_groups(reward_B, G) - _groups(reward_B, G).mean(1, keepdim=True)) / config.weight_temperature
    return _silence(G * (a_PG.softmax(1) - (-a_PG).softmax(1)), reward_B, G)


def _silence(advantage_PG: Tensor, reward_B: Tensor, G: int) -> Tensor:
    return torch.where(zero_spread(reward_B, G)[:, None], 0.0, advantage_PG).reshape(-1)


ADVANTAGES: dict[str, Advantage] = {
    "centred": centred,
    "zscore": zscore,
    "leave_one_out": leave_one_out,
    "reward_weighted": reward_weighted,
    "tilted": tilted,
    "wd1": wd1,
}
