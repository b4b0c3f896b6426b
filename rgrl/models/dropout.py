"""Dropout that belongs to rows, so that neither micro-batches nor processes change what is dropped."""

import torch
from torch import Tensor, nn


class RowKeys:
    """One number a row of the batch that the policy is about to read, shared by all dropout layers."""

    key_B: Tensor | None = None  # int32


class RowDropout(nn.Module):
    """Dropout of which each row's mask follows from its key, the layer, the token's place and the feature.

    `nn.Dropout` draws for a whole batch at once, so its masks change with the rows that happen to share it.
    Places are counted from the right, so padding before a prompt changes nothing either.
    """

    def __init__(self, p: float, layer: int, keys: RowKeys) -> None:
        super().__init__()
        self.p, self.layer, self.keys = p, layer, keys

    def forward(self, x_BLD: Tensor) -> Tensor:
        if not self.training:
            return x_BLD
        if self.keys.key_B is None:
            raise RuntimeError("set `policy.row_keys.key_B` before a reading with dropout")
        B, L, D = x_BLD.shape
        # One row alone is read for company (`Lockstep`): it has no key of its own, and needs none.
        key_B = scatter(self.keys.key_B[:B].to(x_BLD.device) + self.layer)
        place_L = torch.arange(L - 1, -1, -1, dtype=torch.int32, device=x_BLD.device)
        feature_D = scatter(torch.arange(D, dtype=torch.int32, device=x_BLD.device))
        token_BL = scatter(key_B[:, None] + place_L)
        # Uniform over int32, so the lowest share p of its range is dropped.
        dropped_BLD = scatter(token_BL[..., None] ^ feature_D) < round(self.p * 2**32) - 2**31
        return (x_BLD / (1 - self.p)).masked_fill(dropped_BLD, 0.0)


def scatter(x: Tensor) -> Tensor:
    """A permutation of int32 after which neighbours have nothing in common (`lowbias32`, Wellons 2018).

    The same on every device, unlike a generator's numbers. Products wrap around.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x = (x ^ _right(x, shift)) * factor
    return x ^ _right(x, 16)


def _right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & (2 ** (32 - n) - 1)
