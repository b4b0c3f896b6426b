"""Autoregressive checkpoints turned diffusion (A2D, as dllm makes them): transformers' own classes and file format.

Attention goes both ways. Logits are shifted by one, as in the model that they come from, unless `model.shifted` says
otherwise: dllm trains either kind (`right_shift_logits`), and its checkpoints do not say which.

`Family` in base.py explains the fields.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
)
from transformers.activations import ACT2FN

from rgrl.errors import ConfigError
from rgrl.models.families.base import Family, require
from rgrl.models.families.dream import DREAM
from rgrl.models.families.fields import Fields, check_sizes, positive, rope_parameters, words
from rgrl.models.families.llada import LLADA

_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES = (*_NEEDED, "num_key_value_heads", "head_dim", "max_position_embeddings")
_PASSED_ON = (*_SIZES, "hidden_act", "tie_word_embeddings")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_QWEN = {"use_sliding_window": (False,), "use_mrope": (False,)}
_WINDOWS = words("sliding_window max_window_layers")  # without `use_sliding_window`


def _config_maker(
    config_class: type[PreTrainedConfig], biases: tuple[str, ...]
) -> Callable[[dict[str, Any]], PreTrainedConfig]:
    """`biases`: fields of the class that say which linear layers have one."""

    def make(config: dict[str, Any]) -> PreTrainedConfig:
        require(config, _NEEDED, "A2D")
        check_sizes(config, _SIZES)
        kinds = config.get("layer_types")
        if kinds is not None and kinds != ["full_attention"] * config["num_hidden_layers"]:
            raise ConfigError('`layer_types` must be "full_attention" for each layer of an A2D model')
        if config.get("hidden_act", "silu") not in ACT2FN:
            raise ConfigError(f"`hidden_act` is {config['hidden_act']!r}, which transformers does not know")
        # As many as there are heads, where none are named: the classes have defaults of their own size.
        config = config | {"num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"]}
        given = {name: config[name] for name in (*_PASSED_ON, *biases) if config.get(name) is not None}
        for name in ("tie_word_embeddings", *biases):
            if type(given.get(name, False)) is not bool:
                raise ConfigError(f"`{name}` is {given[name]!r}; expected true or false")
        return config_class(
            **given,
            **{name: config.get(name) for name in _TOKENS},  # none but its own: the classes have defaults
            rms_norm_eps=positive(config, "rms_norm_eps", 1e-6),
            rope_parameters=rope_parameters(config, "A2D"),
        )

    return make


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """AutoTokenizer would look for the class of a model type that transformers does not know."""
    own = (folder / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if own else Qwen2Tokenizer).from_pretrained(folder)


def _family(
    model_class: type[PreTrainedModel],
    like: Family,
    biases: tuple[str, ...] = (),
    only: dict[str, tuple[Any, ...]] | None = None,
    harmless: frozenset[str] = frozenset(),
) -> Family:
    """The family of transformers' `model_class`, with the chat format of models `like` it."""
    config_class = model_class.config_class
    used = words("rms_norm_eps rope_theta rope_scaling rope_parameters mask_token_id layer_types")
    return Family(
        name="a2d",
        model_type=f"a2d-{config_class.model_type}",
        model_class=model_class,
        make_config=_config_maker(config_class, biases),
        fields=Fields(
            used=frozenset({*_PASSED_ON, *_TOKENS, *biases}) | used,
            harmless=harmless,
            # Dropout is of training; `lora.dropout` is what a run has.
            only={"attention_dropout": (0.0,), "partial_rotary_factor": (1.0,), **(only or {})},
        ),
        rename=lambda name: name,
        load_tokenizer=_load_tokenizer,
        shifted=True,
        end_of_turn=like.end_of_turn,
        chat_template=like.chat_template,
    )


A2D = (
    # Queries, keys and values have a bias in every Qwen2.
    _family(Qwen2ForCausalLM, DREAM, only={**_QWEN, "attention_bias": (True,)}, harmless=_WINDOWS),
    _family(Qwen3ForCausalLM, DREAM, ("attention_bias",), only=_QWEN, harmless=_WINDOWS),
    # The slices of `pretraining_tp` add up to the same.
    _family(LlamaForCausalLM, LLADA, ("attention_bias", "mlp_bias"), harmless=words("pretraining_tp")),
)
