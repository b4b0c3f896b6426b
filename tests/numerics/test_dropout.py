"""LoRA dropout by row: the right fraction, no pattern, and nothing but the row's key decides."""

import pytest
import torch

from rgrl.config import LoraConfig
from rgrl.models import add_lora, load_policy
from rgrl.models.dropout import RowDropout, RowKeys, scatter
from rgrl.models.lora import adapter_parameters
from rgrl.seeds import row_keys


def dropped(p: float, key_B: torch.Tensor, L: int, D: int, layer: int = 0) -> torch.Tensor:
    """Which of B x L x D ones are dropped."""
    keys = RowKeys()
    keys.key_B = key_B
    out_BLD = RowDropout(p, layer, keys)(torch.ones(len(key_B), L, D))
    assert set(out_BLD.unique().tolist()) <= {0.0, (torch.ones(()) / (1 - p)).item()}
    return out_BLD == 0


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_fraction_is_p_in_every_direction(p):
    B, L, D = 16, 64, 1024
    dropped_BLD = dropped(p, row_keys(0, 0, range(B), "t"), L, D).float()
    for axes in ((0,), (1,), (2,)):  # means over two of the three: rows, places and features are all alike
        others = tuple(axis for axis in range(3) if axis not in axes)
        n = dropped_BLD.numel() / dropped_BLD.shape[axes[0]]
        deviation = (dropped_BLD.mean(others) - p) / (p * (1 - p) / n) ** 0.5
        assert deviation.abs().max() < 5.5 and 0.5 < deviation.std() < 1.5


def test_rows_layers_and_neighbours_have_nothing_in_common():
    key_B = row_keys(0, 0, range(4), "t")
    L, D = 64, 512
    masks = [dropped(0.5, key_B, L, D, layer) for layer in range(3)]
    a_BLD = masks[0]
    pairs = [(masks[0], masks[1]), (masks[1], masks[2]), (a_BLD[:2], a_BLD[2:]), (a_BLD[:, 1:], a_BLD[:, :-1])]
    pairs += [(a_BLD[..., 1:], a_BLD[..., :-1]), (a_BLD[..., 256:], a_BLD[..., :256])]
    for x, y in pairs:
        assert abs(float((x == y).float().mean()) - 0.5) < 4.5 * 0.5 / x.numel() ** 0.5


def test_scatter_is_a_permutation():
    x = torch.cat([torch.arange(2**20, dtype=torch.int32), torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)])
    assert len(scatter(x).unique()) == len(x)

    # The first values of the published function, in unsigned arithmetic of Python's own.
    def reference(v: int) -> int:
        v ^= v >> 16
        v = v * 0x7FEB352D % 2**32
        v ^= v >> 15
        v = v * 0x846CA68B % 2**32
        return v ^ v >> 16

    some = torch.tensor([0, 1, 2, 12345, 2**31 - 1, -1, -7], dtype=torch.int32)
    assert [v % 2**32 for v in scatter(some).tolist()] == [reference(v % 2**32) for v in some.tolist()]


def test_neither_other_rows_nor_padding_change_a_row():
    key_B = row_keys(3, 1, range(6), "dropout 0")
    whole_BLD = dropped(0.3, key_B, 12, 40)
    assert torch.equal(dropped(0.3, key_B[2:4], 12, 40), whole_BLD[2:4])
    assert torch.equal(dropped(0.3, key_B, 9, 40), whole_BLD[:, 3:]), "places are counted from the right"
    assert not torch.equal(dropped(0.3, row_keys(3, 2, range(6), "dropout 0"), 12, 40), whole_BLD)


def test_the_policy_drops_in_training_only_and_needs_the_keys_of_its_rows(dream_dir):
    policy = add_lora(load_policy(dream_dir), LoraConfig(r=4, dropout=0.5), seed=0).eval()
    for p in adapter_parameters(policy).values():
        p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    ids_BL = torch.arange(8)[None].repeat(2, 1)
    everywhere_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    with torch.no_grad():
        evaluated_BLV = policy.logits(ids_BL, everywhere_BL)
        assert torch.equal(evaluated_BLV[0], evaluated_BLV[1])
        policy.train()
        with pytest.raises(RuntimeError, match="row_keys"):
            policy.logits(ids_BL, everywhere_BL)
        with policy.forward_passes(row_keys(0, 0, range(2), "dropout 0")):
            trained_BLV = policy.logits(ids_BL, everywhere_BL)
            assert torch.equal(policy.logits(ids_BL, everywhere_BL), trained_BLV), "as recomputing needs"
    assert (trained_BLV[0] - trained_BLV[1])[:, :4000].abs().max() > 1e-2
    assert (trained_BLV - evaluated_BLV)[..., :4000].abs().max() > 1e-2
