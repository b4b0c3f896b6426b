"""Attention both ways and past padding, in each of transformers' attention kernels, which take masks of their own.

A mask of the wrong kind is no error: `eager` adds a bool mask to its scores, and flash attention is causal unless each
layer says otherwise.
"""

import importlib.util

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rgrl.errors import ConfigError
from rgrl.models.policy import mask_for
from rgrl.models.text import count_positions

_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
# How far the same row may be apart in two kernels or shapes: the rounding of all layers, and not another mask.
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
    """Tell each layer too that it isn't causal: a kernel that takes no mask may ask it, and not the config."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Raise `ConfigError` unless attention goes both ways and past padding, in this class and by this kernel.

    A class or a kernel with a mask of its own is no error in transformers. Compares a few short rows: with another
    last token, with other padding, and with the same by `sdpa`.
    """
    chosen = model.config._attn_implementation
    ids_BL = torch.arange(3, 27, device=model.device).remainder(model.config.vocab_size).view(3, 8)
    ids_BL[1, :7] = ids_BL[0, :7]  # another last token
    ids_BL[2, 3:] = ids_BL[0, :5]
    attention_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    attention_BL[2, :3] = False
    who = f"{type(model).__name__} (`model.attn_implementation: {chosen}`)"
    try:
        states_BLH = _states(model, ids_BL, attention_BL)
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{who} does not take token ids, a mask, positions and a cache: {reason}") from error
    alone_BLH = _states(model, ids_BL[:1, :5], attention_BL[:1, :5])
    if not bool(states_BLH.isfinite().all()):  # by its weights; no mask can tell
        return
    if _gap(states_BLH[1, 0], states_BLH[0, 0]) < 1e-5:
        raise ConfigError(f"{who} does not attend both ways: the first token does not see the last one")
    if not _gap(states_BLH[2, 3:], alone_BLH[0]) <= _TOLERANCE[model.dtype]:
        raise ConfigError(f"{who} does not leave padding out: a row's states change with it")
    if chosen == "sdpa":
        return
    model.set_attn_implementation("sdpa")
    gap = _gap(states_BLH[attention_BL], _states(model, ids_BL, attention_BL)[attention_BL])
    model.set_attn_implementation(chosen)
    if not gap <= _TOLERANCE[model.dtype]:
        raise ConfigError(f"{who} does not compute what `sdpa` does: states differ by {gap:.2g} of their size")


def _states(model: PreTrainedModel, ids_BL: Tensor, attention_BL: Tensor) -> Tensor:
    """Final hidden states_BLH, float32, as `Policy.states` asks for them."""
    mask = mask_for(model.config._attn_implementation, attention_BL, ids_BL.shape[1], model.dtype)
    position_BL = count_positions(attention_BL)
    return model.base_model(ids_BL, mask, position_BL, use_cache=False).last_hidden_state.float()


def _gap(x: Tensor, y: Tensor) -> float:
    """The mean difference, as a fraction of the mean size."""
    return float((x - y).abs().mean() / y.abs().mean())
