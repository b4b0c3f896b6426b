"""Autoregressive checkpoints turned diffusion (A2D, as dllm makes them): transformers' own classes and file format.

Attention goes both ways. Logits are shifted by one, as in the model that they come from, unless `model.shifted` says
otherwise: dllm trains either kind (`right_shift_logits`), and its checkpoints do not say which.

`Family` in base.py explains the fields.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rgrl.errors import ConfigError
from rgrl.models.families.base import Family, require
from rgrl.models.families.dream import DREAM
from rgrl.models.families.llada import LLADA

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# Fields that change no number of a forward pass, or are read elsewhere (the mask, by load.py).
_HARMLESS = {
    "_attn_implementation", "_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype",
    "id2label", "is_encoder_decoder", "label2id", "mask_token_id", "model_type", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "tokenizer_class", "torch_dtype", "transformers_version", "unsloth_version",
}  # fmt: skip
# Spellings of `rope_parameters` before transformers 5, which its config classes still read.
_ROPE = {"rope_theta", "rope_scaling"}


def _make_config(config_class: type[PreTrainedConfig]) -> Callable[[dict[str, Any]], PreTrainedConfig]:
    known = {field.name for field in fields(config_class)}

    def make(config: dict[str, Any]) -> PreTrainedConfig:
        require(config, _NEEDED, "A2D")
        if odd := sorted(config.keys() - known - _HARMLESS - _ROPE):
            raise ConfigError(
                f"config.json of this A2D checkpoint has {odd[0]} ({config[odd[0]]}), which transformers' "
                f"{config_class.__name__} does not know"
            )
        given = {name: value for name, value in config.items() if name in known | _ROPE}
        # No end tokens but its own, as the classes have defaults. Attention dropout was for their training.
        tokens: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        made = config_class(**{**tokens, **given, "attention_dropout": 0.0})
        _check(made)
        return made

    return make


def _check(config: PreTrainedConfig) -> None:
    """Refuse what would make a row depend on more than its own tokens, or see less of them. Raises `ConfigError`."""
    for name in {"sliding_attention", "chunked_attention"} & set(getattr(config, "layer_types", None) or ()):
        raise ConfigError(f"config.json of this A2D checkpoint has {name} layers; expected full attention in all")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"config.json of this A2D checkpoint has {config.num_key_value_heads} num_key_value_heads, which must "
            f"divide its {config.num_attention_heads} num_attention_heads"
        )
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind == "longrope":
        raise ConfigError(
            "config.json of this A2D checkpoint has the rope_type longrope, which turns all rows of a batch by its "
            "longest; known: default, linear, dynamic, yarn, llama3"
        )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """AutoTokenizer would look for the class of a model type that transformers does not know."""
    own = (folder / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if own else Qwen2Tokenizer).from_pretrained(folder)


def _family(
    kind: str, config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel], like: Family
) -> Family:
    return Family(
        name="a2d",
        model_type=f"a2d-{kind}",
        model_class=model_class,
        make_config=_make_config(config_class),
        rename=lambda name: name,
        load_tokenizer=_load_tokenizer,
        shifted=True,
        end_of_turn=like.end_of_turn,
        chat_template=like.chat_template,
    )


A2D = (
    _family("qwen2", Qwen2Config, Qwen2ForCausalLM, like=DREAM),
    _family("qwen3", Qwen3Config, Qwen3ForCausalLM, like=DREAM),
    _family("llama", LlamaConfig, LlamaForCausalLM, like=LLADA),
)
