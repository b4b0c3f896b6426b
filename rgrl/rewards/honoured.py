"""A reward model's config and weights, compared before it is built: transformers ignores much of what does not fit."""

import copy
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from rgrl.errors import ConfigError
from rgrl.hub import read_json
from rgrl.models.families.fields import METADATA, fields_of
from rgrl.models.weights import check_floats, check_layer_count, check_unquantized, find_weights

# Buffers of fixed numbers that older checkpoints hold, made anew by transformers.
_FIXED = re.compile(
    r"(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|position_ids|token_type_ids|relative_position_index|"
    r"masked_bias|attn\.bias|attention\.bias|attention\.rotary_emb\.\w+)$"
)
# Weights of another head on the same model, which a score does not pass through.
_OTHER_HEADS = re.compile(
    r"(^|\.)(lm_head|embed_out|cls|lm_predictions|mask_predictions|vocab_transform|vocab_layer_norm|vocab_projector|"
    r"generator_predictions|discriminator_predictions|seq_relationship|pooler)\."
)
UNBUILT = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
)
# Words in the names of fields that make another forward pass, in some architecture or other.
_COUNTS = re.compile(
    r"rope|rotary|(?<!max_)window|scal|softcap|logit|alibi|norm|bias|multiplier|attention_type|layer_types|"
    r"position_embedding|head_dim|kv_heads|parallel_residual|^activation|hidden_act|clip|experts|tie_|bidirectional"
)


def read_config(folder: Path, what: str) -> PreTrainedConfig:
    """The config of the reward model in `folder`, compared with the headers of its weights; `what` begins errors.

    Raises `ConfigError` for a config that transformers cannot read, a field that changes a forward pass and that the
    class ignores, quantized weights, tensors of another shape or of integers, and more layers than there are.
    """
    raw = read_json(folder / "config.json")
    check_unquantized(raw, what)
    if raw.get("transformers_weights"):
        raise ConfigError(f"{what}: `transformers_weights` in config.json is not supported; use model.safetensors")
    stored = find_weights(folder, what)
    # Some architectures share weights between layers, so this only keeps an absurd number from being built.
    check_layer_count(raw, 8 * len(stored) + 64, what)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(f"{what} is no class of transformers', and code of a checkpoint is never run") from error
        raise ConfigError(f"{what}: its config.json cannot be read: {error}") from error
    if "AutoModelForSequenceClassification" in (raw.get("auto_map") or {}):
        raise ConfigError(
            f"{what} brings along a class of its own (`auto_map` in config.json), and code of a checkpoint is never "
            f"run; if transformers' {config.model_type} class computes the same, remove `auto_map` from a copy"
        )
    if config.num_labels != 1:
        raise ConfigError(f"{what} has {config.num_labels} labels; a reward model has exactly 1")
    check_floats({name: tensor for name, tensor in stored.items() if not _FIXED.search(name)}, what)
    model = _skeleton(config, what)
    _check_fields(raw, model, what)
    for name, tensor in model.state_dict().items():
        if name in stored and stored[name].shape != tuple(tensor.shape):
            raise ConfigError(
                f"{what} cannot be loaded: {name} has shape {stored[name].shape}, config.json implies "
                f"{tuple(tensor.shape)}"
            )
    return config


def _check_fields(raw: dict[str, Any], model: PreTrainedModel, what: str) -> None:
    known, source = fields_of(model.config).used | METADATA, ""
    for name, value in raw.items():
        empty = value is None or value in (False, 0, 1.0, [], {}, "absolute")
        if name in known or empty or not _COUNTS.search(name):
            continue
        # Some fields are no part of a config, and are read where there is one.
        source = source or inspect.getsource(sys.modules[type(model).__module__])
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise ConfigError(
                f"{what}: `{name}` ({str(value)[:60]}) in config.json is ignored by {type(model).__name__}; remove it "
                "if the model is meant to be without"
            )


def _skeleton(config: PreTrainedConfig, what: str) -> PreTrainedModel:
    """The model without its numbers. Takes no memory."""
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(copy.deepcopy(config), trust_remote_code=False)
    except UNBUILT as error:
        raise ConfigError(f"{what} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def check_used(model: nn.Module, info: dict[str, Any], what: str) -> None:
    """Raise `ConfigError` for weights that transformers had no place for (`info` of loading), or none to put there."""
    if info["missing_keys"]:
        raise ConfigError(f"{what} lacks the weights {sorted(info['missing_keys'])[0]} and so has no score")
    left = [n for n in sorted(info["unexpected_keys"]) if not _FIXED.search(n) and not _OTHER_HEADS.search(n)]
    if left:
        raise ConfigError(
            f"{what} holds the weights {left[0]}, which {type(model).__name__} has no place for ({len(left)} such)"
        )
