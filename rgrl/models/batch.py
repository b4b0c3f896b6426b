"""Rows of tokens of different lengths in one batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], device: torch.device | str, fill: int = 0) -> tuple[Tensor, Tensor]:
    """ids_BL (int64, `fill` on padding) and attention_BL (bool, False on padding) of token rows."""
    width = max(map(len, rows))
    ids_BL = torch.full((len(rows), width), fill, dtype=torch.long)
    attention_BL = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, ids in enumerate(rows):
        ids_BL[i, width - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        attention_BL[i, width - len(ids) :] = True
    return ids_BL.to(device), attention_BL.to(device)


def count_positions(attention_BL: Tensor) -> Tensor:
    """position_BL, which counts attended tokens from 0, so that padding changes nothing."""
    return (attention_BL.long().cumsum(1) - 1).clamp(min=0)
