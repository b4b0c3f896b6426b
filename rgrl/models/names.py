"""The adapter under the names of the base's own checkpoint, so that `peft` finds its places in the authors' class.

A policy runs in one of transformers' classes, whose tensors may have other names than the authors' (LLaDA's have). An
adapter is saved under the authors' names, and read under either. The names come from the checkpoint itself
(`Policy.names`), so they are right for any family.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rgrl.models.policy import Policy

# The names that peft gives to LoRA's tensors in a file.
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?P<factor>lora_[AB])\.weight")


def layer_of(name: str) -> str | None:
    """The layer that a tensor of an adapter belongs to, in the file's own names; None if it is no LoRA factor."""
    found = _KEY.fullmatch(name)
    return found["layer"] if found else None


def factor_name(layer: str, factor: str) -> str:
    """The name of a layer's `lora_A` or `lora_B` in an adapter's file."""
    return f"base_model.model.{layer}.{factor}.weight"


def original_layers(names: Mapping[str, str]) -> dict[str, str]:
    """The layers of a model: name in transformers' class -> in the checkpoint, from `names`, those of the tensors."""
    weight = ".weight"
    return {
        ours.removesuffix(weight): original.removesuffix(weight)
        for ours, original in names.items()
        if ours.endswith(weight) and original.endswith(weight)
    }


def to_original(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """An adapter's tensors under the checkpoint's names, from those under transformers'."""
    return _renamed(tensors, original_layers(names))


def to_ours(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """An adapter's tensors under transformers' names, whether they come under those or under the checkpoint's.

    Names that are not all the checkpoint's stay as they are: strict loading then says which of them has no place.
    """
    back = {original: ours for ours, original in original_layers(names).items()}
    if not {layer_of(name) for name in tensors} <= back.keys():
        return dict(tensors)
    return _renamed(tensors, back)


def _renamed(tensors: Mapping[str, Tensor], layers: Mapping[str, str]) -> dict[str, Tensor]:
    def rename(name: str) -> str:
        found = _KEY.fullmatch(name)
        return factor_name(layers[found["layer"]], found["factor"]) if found and found["layer"] in layers else name

    return {rename(name): tensor for name, tensor in tensors.items()}


def target_modules(adapted: Iterable[str], layers: Iterable[str]) -> list[str]:
    """What to write as `target_modules`, so that peft adapts exactly the layers `adapted` of all `layers`.

    peft takes a name for every layer that it is the end of. The last parts of the names do where they hit nothing else,
    such as a head that is called like a layer of the blocks; otherwise these are the whole names.
    """
    adapted = set(adapted)
    last = {layer.rsplit(".", 1)[-1] for layer in adapted}
    hit = {layer for layer in layers if layer.rsplit(".", 1)[-1] in last}
    return sorted(last if hit == adapted else adapted)


def settings_of(policy: Policy, adapter: Iterable[str]) -> dict[str, Any]:
    """The adapter's `adapter_config.json`, for tensors of these names (the checkpoint's).

    It names no task: with one, peft asks for methods that the authors' classes, which do not decode causally, lack.
    """
    assert policy.peft_model is not None
    config = policy.peft_model.peft_config["default"].to_dict()
    adapted = {layer for name in adapter if (layer := layer_of(name)) is not None}
    return config | {
        "base_model_name_or_path": policy.path,
        "revision": None if Path(policy.path).exists() else policy.fingerprint.get("commit"),
        "target_modules": target_modules(adapted, original_layers(policy.names).values()),
        "task_type": None,
        "inference_mode": True,
    }
