"""Attention both ways and past padding, in each of transformers' attention kernels, which take masks of their own.

A mask of the wrong kind is no error: `eager` adds a bool mask to its scores, and flash attention is causal unless each
layer says otherwise.
"""

import importlib.util

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rgrl.errors import ConfigError

_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
# How far two kernels may be apart, relative to the largest value: rounding of all layers, not another mask.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def check_kernel(implementation: str, dtype: str, device: torch.device | str) -> None:
    """Raise `ConfigError` where this machine, or this type of weights, cannot run an attention kernel.

    Here, as transformers would fetch another kernel from the Hub, and run it.
    """
    if implementation not in _PACKAGES:
        return
    module, package = _PACKAGES[implementation]
    needs = f"`model.attn_implementation: {implementation}` needs"
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{needs} the package {package}, which is not installed; `sdpa` needs none")
    if torch.device(device).type != "cuda":
        raise ConfigError(f"{needs} a GPU, and this runs on {torch.device(device).type}; `sdpa` runs anywhere")
    if dtype != "bfloat16":
        raise ConfigError(f"{needs} `model.dtype: bfloat16`, not {dtype}")


def attend_both_ways(model: PreTrainedModel) -> None:
    """Tell each layer that it isn't causal. Kernels that build no mask ask the layer, and not the config."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def mask_for(implementation: str, attention_BL: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """The mask that lets the last `queries` places see every attended place, as a kernel takes it.

    `attention_BL` is False on padding. For `sdpa` bool_B1QL, for `eager` what is added to the scores, in `dtype`; flash
    attention takes bool_BL.
    """
    if implementation in _PACKAGES:
        return attention_BL
    # In the shape that attention takes: transformers would inspect a mask by token, and a GPU would have to wait.
    mask_B1QL = attention_BL[:, None, None].expand(-1, 1, queries, -1)
    if implementation == "sdpa":
        return mask_B1QL
    return torch.zeros_like(mask_B1QL, dtype=dtype).masked_fill(~mask_B1QL, torch.finfo(dtype).min)


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Raise `ConfigError` unless the model's kernel sees what `sdpa` sees: both ways, and past padding.

    Compares the two on rows of different lengths. Nothing to compare for `sdpa`, whose masks the tests know.
    """
    chosen = model.config._attn_implementation
    if chosen == "sdpa":
        return
    ids_BL = (torch.arange(24, device=model.device) * 7 % model.config.vocab_size).view(3, 8)
    attention_BL = torch.arange(8, device=model.device) >= torch.tensor([0, 3, 6], device=model.device)[:, None]
    position_BL = (attention_BL.long().cumsum(1) - 1).clamp(min=0)
    states = {}
    for implementation in ("sdpa", chosen):
        model.set_attn_implementation(implementation)
        mask = mask_for(implementation, attention_BL, 8, model.dtype)
        body = model.base_model
        states[implementation] = (
            body(ids_BL, mask, position_BL, use_cache=False).last_hidden_state[attention_BL].float()
        )
    gap = float((states[chosen] - states["sdpa"]).abs().max() / states["sdpa"].abs().max())
    if not gap <= _TOLERANCE[model.dtype]:
        raise ConfigError(
            f"`model.attn_implementation: {chosen}` does not attend both ways past padding in this model: its states "
            f"differ from those of `sdpa` by {gap:.2g} of the largest; use `sdpa`"
        )
