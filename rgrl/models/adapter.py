"""Read a peft adapter strictly: what it says is understood, and each of its tensors finds its place."""

import json
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from rgrl.errors import ConfigError
from rgrl.hub import read_json
from rgrl.models.weights import check_finite, check_floats, read_header, read_tensors

# Fields of adapter_config.json that peft honours and that are kept as they are.
_USED = frozenset(
    "peft_type r lora_alpha target_modules target_parameters exclude_modules fan_in_fan_out bias lora_bias use_rslora "
    "use_dora modules_to_save layers_to_transform layers_pattern rank_pattern alpha_pattern ensure_weight_tying".split()
)
# Fields that say where an adapter comes from or how it was trained, and change nothing in what it computes.
_HARMLESS = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout megatron_core "
    "init_lora_weights loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config".split()
)
# Ways to draw the first A and B that leave the base as it was. Others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change it.
_DRAWN = (True, False, None, "gaussian", "orthogonal", "eva")


def read_adapter(folder: Path, what: str) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
    """The settings of a LoRA adapter and its tensors by peft's names, in the dtype they are stored in, on the CPU.

    `what` names the adapter in errors, such as "`reward.adapter` sft/adapter". Raises `ConfigError` for anything else
    than LoRA, settings that are not understood, weights that are not in safetensors, not floating-point or not finite.
    """
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_path.is_file():
        raise ConfigError(f"{what}: no adapter_config.json there")
    config = read_config(config_path, what)
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        told = "only adapter_model.bin, a pickle, which is never opened: save it as" if pickled else "no weights:"
        raise ConfigError(f"{what}: {told} {'adapter_model.safetensors' if pickled else f'expected {path.name}'}")
    check_floats(read_header(path, what), what)
    tensors = read_tensors(path, what)
    check_finite(tensors, what)
    return config, tensors


def read_config(path: Path, what: str) -> peft.LoraConfig:
    """The settings of a LoRA adapter, as `read_adapter`. Raises `ConfigError`."""
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"{what}: `peft_type` is {raw.get('peft_type')!r} in {path.name}; supported: 'LORA'")
    for name, value in raw.items():
        if name not in _USED | _HARMLESS and value not in (None, False, [], {}):
            raise ConfigError(f"{what}: `{name}` is {json.dumps(value)[:80]} in {path.name}, which is not supported")
    if raw.get("init_lora_weights", True) not in _DRAWN:
        raise ConfigError(
            f"{what}: `init_lora_weights` is {raw['init_lora_weights']!r} in {path.name}, which changes the base "
            "model; have peft convert the adapter (`path_initial_model_for_weight_conversion`)"
        )
    known: dict[str, Any] = {name: value for name, value in raw.items() if name in _USED}
    try:
        if not isinstance(raw.get("r"), int) or raw["r"] < 1:
            raise ValueError(f"`r` is {raw.get('r')!r}")
        return peft.LoraConfig(**known | {"task_type": raw.get("task_type"), "inference_mode": True})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {path.name} does not describe a LoRA adapter: {error}") from error


def fit_adapter(model: PeftModel, tensors: dict[str, Tensor], what: str) -> None:
    """Load tensors of `read_adapter` into a model that has an adapter called "default"; all must fit, in both ways.

    Raises `ConfigError` for a tensor without a place, a place without a tensor, and for another shape.
    """
    # Parameters and not `state_dict`, which would gather the sharded layers of the base.
    places = get_peft_model_state_dict(
        model, state_dict=dict(model.named_parameters(remove_duplicate=False)), save_embedding_layers=False
    )
    if extra := sorted(tensors.keys() - places.keys()):
        raise ConfigError(f"{what}: {extra[0]} has no place in this model ({len(extra)} such tensors)")
    if missing := sorted(places.keys() - tensors.keys()):
        raise ConfigError(f"{what}: it lacks {missing[0]}, which its settings imply ({len(missing)} such tensors)")
    for name, place in places.items():
        if tensors[name].shape != place.shape:
            raise ConfigError(
                f"{what}: {name} has shape {tuple(tensors[name].shape)}, this model implies {tuple(place.shape)}"
            )
    left = set_peft_model_state_dict(model, tensors).unexpected_keys
    if left:  # names that peft changed on their way in
        raise ConfigError(f"{what}: {left[0]} has no place in this model ({len(left)} such tensors)")


def merge_adapter(model: PreTrainedModel, folder: Path, what: str) -> PreTrainedModel:
    """`model` with the adapter in `folder` merged into its weights. Raises `ConfigError` unless it fits exactly."""
    config, tensors = read_adapter(folder, what)
    try:
        with torch.random.fork_rng():  # peft draws an adapter, which is overwritten
            adapted = peft.get_peft_model(model, config)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{what} does not fit {type(model).__name__}: {' '.join(str(error).split())}") from error
    fit_adapter(adapted, tensors, what)
    return adapted.merge_and_unload()
