"""What distinguishes one model family from another: all of it, and only here.

Each family maps its authors' checkpoint onto one of transformers' own decoder classes, which attend both
ways when `config.is_causal` is False. No remote code is ever run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from rgrl.config import ConfigError


@dataclass(frozen=True)
class Family:
    """How to read one family's checkpoints and its logits."""

    name: str
    model_type: str  # as in the checkpoint's config.json
    model_class: type
    make_config: Callable[[dict[str, Any]], PreTrainedConfig]
    rename: Callable[[str], str]  # tensor name in the checkpoint -> in transformers' class
    load_tokenizer: Callable[[Path], PreTrainedTokenizerBase]
    shifted: bool  # the state at l-1 scores token l
    end_of_turn: str  # token that ends an answer, besides end-of-text, where the tokenizer has it
    chat_template: str  # used where the checkpoint has none


def _require(config: dict[str, Any], keys: tuple[str, ...], family: str) -> None:
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ConfigError(f"config.json of this {family} checkpoint lacks {', '.join(missing)}")


def _dream_config(config: dict[str, Any]) -> PreTrainedConfig:
    _require(
        config, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"), "Dream"
    )
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings rope_theta attention_dropout "
        "pad_token_id eos_token_id bos_token_id"
    ).split()
    return Qwen2Config(**{name: config[name] for name in names if name in config})


def _llada_config(config: dict[str, Any]) -> PreTrainedConfig:
    _require(config, ("d_model", "n_heads", "n_layers", "mlp_hidden_size"), "LLaDA")
    return LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        max_position_embeddings=config.get("max_sequence_length", 4096),
        rope_theta=config.get("rope_theta", 10000.0),
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        tie_word_embeddings=bool(config.get("weight_tying", False)),
        attention_bias=bool(config.get("include_qkv_bias", False)),
        mlp_bias=False,
        pad_token_id=config.get("pad_token_id"),
        eos_token_id=config.get("eos_token_id"),
    )


_LLADA_TOP = {
    "model.transformer.wte.": "model.embed_tokens.",
    "model.transformer.ln_f.": "model.norm.",
    "model.transformer.ff_out.": "lm_head.",
}
_LLADA_BLOCK = {
    "attn_out": "self_attn.o_proj",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def _llada_rename(name: str) -> str:
    block = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block and block[2] in _LLADA_BLOCK:
        return f"model.layers.{block[1]}.{_LLADA_BLOCK[block[2]]}.{block[3]}"
    for old, new in _LLADA_TOP.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


DREAM = Family(
    name="dream",
    model_type="Dream",
    model_class=Qwen2ForCausalLM,
    make_config=_dream_config,
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
LLADA = Family(
    name="llada",
    model_type="llada",
    model_class=LlamaForCausalLM,
    make_config=_llada_config,
    rename=_llada_rename,
    load_tokenizer=PreTrainedTokenizerFast.from_pretrained,
    shifted=False,
    end_of_turn="<|eot_id|>",
    chat_template=(
        "{{ bos_token or '' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
)
FAMILIES = {family.name: family for family in (DREAM, LLADA)}


def find_family(model_type: str | None, name: str = "auto") -> Family:
    """The family called `name`, or the one whose checkpoints say `model_type`. Raises `ConfigError`."""
    if name != "auto":
        return FAMILIES[name]
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise ConfigError(f"unknown model_type {model_type!r} in config.json; known: {known}")
