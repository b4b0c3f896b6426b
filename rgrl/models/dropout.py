"""Dropout with a mask per row, so that neither micro-batches nor processes change what is dropped."""

import torch
from torch import Tensor, nn


class RowKeys:
    """One number a row of the next forward pass, shared by all dropout layers."""

    key_B: Tensor | None = None  # int32


class RowDropout(nn.Module):
    """Dropout whose mask is a hash of the row's key, the layer, the token's position and the feature.

    `nn.Dropout` draws for a whole batch at once, so its masks depend on the other rows of the batch. Positions count
    from the right, so padding before a prompt changes nothing either.
    """

    def __init__(self, p: float, layer: int, keys: RowKeys) -> None:
        super().__init__()
        self.p, self.layer, self.keys = p, layer, keys

    def forward(self, x_BLD: Tensor) -> Tensor:
        if not self.training:
            return x_BLD
        if self.keys.key_B is None:
            raise RuntimeError("a forward pass with dropout needs row_keys: use `policy.forward_passes(dropout_key_B)`")
        B, L, D = x_BLD.shape
        # The dummy forward pass (`Lockstep`) has one row; any key will do.
        key_B = scatter(self.keys.key_B[:B].to(x_BLD.device) + self.layer)
        place_L = torch.arange(L - 1, -1, -1, dtype=torch.int32, device=x_BLD.device)
        feature_D = scatter(torch.arange(D, dtype=torch.int32, device=x_BLD.device))
        token_BL = scatter(key_B[:, None] + place_L)
        # Uniform over int32, so the lowest fraction p of its range is dropped.
        dropped_BLD = scatter(token_BL[..., None] ^ feature_D) < round(self.p * 2**32) - 2**31
        return (x_BLD / (1 - self.p)).masked_fill(dropped_BLD, 0.0)


def scatter(x: Tensor) -> Tensor:
    """A permutation of int32 that decorrelates neighbours (`lowbias32`, Wellons 2018). Products wrap around.

    The same on every device, unlike a generator's numbers.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x = (x ^ _right(x, shift)) * factor
    return x ^ _right(x, 16)


def _right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & (2 ** (32 - n) - 1)
