"""Dream (arXiv 2508.15487): Qwen2's decoder with attention both ways, and logits shifted by one.

`Family` in base.py explains the fields.
"""

from typing import Any

from transformers import PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.activations import ACT2FN

from rgrl.errors import ConfigError
from rgrl.models.families.base import Family, require
from rgrl.models.families.fields import Fields, check_sizes, flag, positive, rope_parameters, words

_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings"
).split()
_PASSED_ON = (*_SIZES, "hidden_act", "pad_token_id", "eos_token_id", "bos_token_id")
_FIELDS = Fields(
    used=words(
        " ".join(_PASSED_ON),
        "tie_word_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters mask_token_id head_dim layer_types",
    ),
    harmless=words("sliding_window max_window_layers"),  # without `use_sliding_window`
    only={
        "use_sliding_window": (False,),
        "use_mrope": (False,),
        "attention_dropout": (0.0,),  # of training; `lora.dropout` is what a run has
        "attention_bias": (True,),  # queries, keys and values have one in every Qwen2
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0,),
    },
)


def _dream_config(config: dict[str, Any]) -> PreTrainedConfig:
    require(
        config, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"), "Dream"
    )
    check_sizes(config, _SIZES)
    width = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") not in (None, width):
        raise ConfigError(f"`head_dim` is {config['head_dim']}; Dream's is hidden_size / num_attention_heads, {width}")
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * config["num_hidden_layers"]:
        raise ConfigError('`layer_types` must be "full_attention" for each layer of a Dream model')
    if (config.get("hidden_act") or "silu") not in ACT2FN:
        raise ConfigError(f"`hidden_act` is {config['hidden_act']!r}, which transformers does not know")
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        config = config | {"num_key_value_heads": config["num_attention_heads"]}
    return Qwen2Config(
        **{name: config[name] for name in _PASSED_ON if config.get(name) is not None},
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        rms_norm_eps=positive(config, "rms_norm_eps", 1e-6),
        rope_parameters=rope_parameters(config, "Dream"),
    )


DREAM = Family(
    name="dream",
    model_type="Dream",
    model_class=Qwen2ForCausalLM,
    make_config=_dream_config,
    fields=_FIELDS,
    rename=lambda name: name,
    # Dream ships Qwen2's byte-level BPE as vocab.json + merges.txt under a class name of its own.
    load_tokenizer=Qwen2Tokenizer.from_pretrained,
    shifted=True,
    end_of_turn="<|im_end|>",
    chat_template=(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
)
