"""Load a reward model's checkpoint, and refuse one that transformers would load only in part.

transformers ignores fields of config.json that a class does not know, weights that it has no module for, and makes up
those that are missing. Each of these would be a silent wrong score.
"""

import copy
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rgrl.errors import ConfigError
from rgrl.hub import fetch_checkpoint, read_json
from rgrl.models.adapter import merge_adapter
from rgrl.models.families.fields import METADATA, fields_of
from rgrl.models.fingerprint import adapter_fingerprint, fingerprint
from rgrl.models.weights import check_finite, check_floats, check_layer_count, check_unquantized, find_weights
from rgrl.rewards.classifier import ClassifierReward, verify
from rgrl.rewards.template import InputTemplate, make_template

# Buffers of constants that older checkpoints hold and transformers computes.
_CONSTANTS = re.compile(
    r"(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|position_ids|token_type_ids|relative_position_index|"
    r"masked_bias|attn\.bias|attention\.bias|attention\.rotary_emb\.\w+)$"
)
# Weights of another head on the same model, which the score does not depend on.
_OTHER_HEADS = re.compile(
    r"(^|\.)(lm_head|embed_out|cls|lm_predictions|mask_predictions|vocab_transform|vocab_layer_norm|vocab_projector|"
    r"generator_predictions|discriminator_predictions|seq_relationship|pooler)\."
)
# Words in the names of fields that change the forward pass of some architecture.
_CHANGES_FORWARD = re.compile(
    r"rope|rotary|(?<!max_)window|scal|softcap|logit|alibi|norm|bias|multiplier|attention_type|layer_types|"
    r"position_embedding|head_dim|kv_heads|parallel_residual|^activation|hidden_act|clip|experts|tie_|bidirectional"
)


def load_classifier(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    adapter: str | None = None,
    name: str = "model",
    max_length: int = 0,
    revision: str | None = None,
) -> ClassifierReward:
    """Load a one-label sequence classifier (with `adapter` merged) from a folder or the Hub, and `verify` it.

    `max_length` and `revision` as in `RewardConfig`. Raises `ConfigError` for anything else, and for a model whose
    score of a text differs between a batch and the text alone.
    """
    folder, what = fetch_checkpoint(str(path), "reward model", revision), f"reward model {path}"
    check_config(folder, what)
    tokenizer = _load_tokenizer(folder, what)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        raise ConfigError(f"{what} cannot be loaded: {error}") from error
    check_weights(model, info, what)
    check_finite(model.state_dict(), what)
    identity = fingerprint(folder)
    if adapter is not None:
        model = merge_adapter(model, Path(adapter), f"`reward.adapter` {adapter}")
        identity["adapter"] = adapter_fingerprint(Path(adapter))
    reward = ClassifierReward(model.to(device), tokenizer, name, identity, max_length)
    verify(reward)
    return reward


def load_template(path: str, name: str, max_length: int = 0, revision: str | None = None) -> tuple[InputTemplate, int]:
    """A reward model's input template and its number of embeddings, without its weights. Raises `ConfigError`."""
    folder, what = fetch_checkpoint(path, "reward model", revision, weights=False), f"reward model {path}"
    try:
        model = _without_weights(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        raise ConfigError(f"{what}: its config.json describes no model: {_short(error)}") from error
    template = make_template(model, _load_tokenizer(folder, what), name, max_length)
    return template, model.get_input_embeddings().weight.shape[0]


def check_config(folder: Path, what: str) -> None:
    """Compare the config of the reward model in `folder` with its class and its weights; `what` begins errors.

    Raises `ConfigError` for a config that transformers cannot read, a field that changes the forward pass and that the
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
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(f"{what} is no class of transformers', and code of a checkpoint is never run") from error
        raise ConfigError(f"{what}: its config.json cannot be read: {error}") from error
    if "AutoModelForSequenceClassification" in (raw.get("auto_map") or {}):
        raise ConfigError(
            f"{what} has a class of its own (`auto_map` in config.json), and code of a checkpoint is never run; if "
            f"transformers' {config.model_type} class computes the same, remove `auto_map` from a copy"
        )
    if config.num_labels != 1:
        raise ConfigError(f"{what} has {config.num_labels} labels; a reward model has exactly 1")
    check_floats({name: tensor for name, tensor in stored.items() if not _CONSTANTS.search(name)}, what)
    try:
        model = _without_weights(config)
    except Exception as error:
        raise ConfigError(f"{what} cannot be loaded: {_short(error)}") from error
    _check_fields(raw, model, what)
    for name, tensor in model.state_dict().items():
        if name in stored and stored[name].shape != tuple(tensor.shape):
            raise ConfigError(
                f"{what} cannot be loaded: {name} has shape {stored[name].shape}, config.json implies "
                f"{tuple(tensor.shape)}"
            )


def _check_fields(raw: dict[str, Any], model: PreTrainedModel, what: str) -> None:
    known, source = fields_of(model.config).used | METADATA, ""
    for name, value in raw.items():
        empty = value is None or value in (False, 0, 1.0, [], {}, "absolute")
        if name in known or empty or not _CHANGES_FORWARD.search(name):
            continue
        # Some fields are not part of a config class, and the model reads them only if they are there.
        source = source or inspect.getsource(sys.modules[type(model).__module__])
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise ConfigError(
                f"{what}: `{name}` ({str(value)[:60]}) in config.json is ignored by {type(model).__name__}; remove it "
                "if the model does not need it"
            )


def check_weights(model: nn.Module, info: dict[str, Any], what: str) -> None:
    """Raise `ConfigError` unless the model has every weight and the checkpoint no others. `info` is that of loading."""
    if info["missing_keys"]:
        raise ConfigError(f"{what} lacks the weights {sorted(info['missing_keys'])[0]} and so has no score")
    left = [n for n in sorted(info["unexpected_keys"]) if not _CONSTANTS.search(n) and not _OTHER_HEADS.search(n)]
    if left:
        raise ConfigError(
            f"{what} holds the weights {left[0]}, which {type(model).__name__} does not have ({len(left)} such)"
        )


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device. Takes no memory."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(copy.deepcopy(config), trust_remote_code=False)


def _load_tokenizer(folder: Path, what: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"{what} has no tokenizer that transformers can load") from error
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # what transformers makes of missing files
        raise ConfigError(f"{what} has no tokenizer: a word has no tokens")
    return tokenizer


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
