"""LLaDA (arXiv 2502.09992): Llama's decoder with attention both ways, under tensor names of its own.

`Family` in base.py explains the fields.
"""

import re
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from rgrl.errors import ConfigError
from rgrl.models.families.base import Family, require
from rgrl.models.families.fields import Fields, check_sizes, flag, positive, rope_parameters, words

_SIZES = "vocab_size d_model n_heads n_kv_heads n_layers mlp_hidden_size max_sequence_length".split()
_FIELDS = Fields(
    used=words(
        " ".join(_SIZES),
        "embedding_size multi_query_attention rope_theta rope_parameters rms_norm_eps weight_tying mask_token_id",
        "pad_token_id eos_token_id tie_word_embeddings",
    ),
    harmless=words(
        "mlp_ratio",  # `mlp_hidden_size` is named
        "alibi_bias_max attention_layer_norm_with_affine",  # of what is ruled out below
        "flash_attention rope_full_precision precision",  # the same up to rounding
        "init_device init_fn init_std init_cutoff_factor",
    ),
    only={
        "block_type": ("llama",),
        "block_group_size": (1,),
        "activation_type": ("silu",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "attention_layer_norm": (False,),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
        "rope": (True,),
        "alibi": (False,),
        "include_bias": (False,),
        "include_qkv_bias": (False,),
        "bias_for_layer_norm": (False,),
        "clip_qkv": (None,),
        # of training; `lora.dropout` is what a run has
        "attention_dropout": (0.0,),
        "residual_dropout": (0.0,),
        "embedding_dropout": (0.0,),
    },
)


def _llada_config(config: dict[str, Any]) -> PreTrainedConfig:
    require(config, ("d_model", "n_heads", "n_layers", "mlp_hidden_size"), "LLaDA")
    check_sizes(config, _SIZES)
    rows = config.get("embedding_size") or config.get("vocab_size")
    check_sizes({"embedding_size": rows}, ("embedding_size",))
    require({"vocab_size": rows}, ("vocab_size",), "LLaDA")
    tied = flag(config, "weight_tying")
    if config.get("tie_word_embeddings", tied) not in (None, tied):
        raise ConfigError("`weight_tying` and `tie_word_embeddings` disagree")
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=_kv_heads(config),
        max_position_embeddings=config.get("max_sequence_length") or 4096,
        # The authors' class knows no scaling of positions.
        rope_parameters=rope_parameters(config, "LLaDA", ("default",)),
        rms_norm_eps=positive(config, "rms_norm_eps", 1e-5),
        tie_word_embeddings=tied,
        attention_bias=False,
        mlp_bias=False,
        pad_token_id=config.get("pad_token_id"),
        eos_token_id=config.get("eos_token_id"),
    )


def _kv_heads(config: dict[str, Any]) -> int:
    """Heads of keys and values: `n_kv_heads`, or else one or all by `multi_query_attention`."""
    heads: int = config["n_heads"]
    kv_heads, single = config.get("n_kv_heads"), config.get("multi_query_attention")
    if single not in (None, False, True):
        raise ConfigError(f"`multi_query_attention` is {single!r}; expected true, false or null")
    implied = 1 if single else heads
    if kv_heads is not None and single is not None and kv_heads != implied:
        raise ConfigError(f"`n_kv_heads` ({kv_heads}) and `multi_query_attention` ({single}) disagree: {implied} heads")
    return kv_heads or implied


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


def llada_rename(name: str) -> str:
    """The name of a tensor in transformers' Llama class, from its name in a LLaDA checkpoint."""
    block = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block and block[2] in _LLADA_BLOCK:
        return f"model.layers.{block[1]}.{_LLADA_BLOCK[block[2]]}.{block[3]}"
    for old, new in _LLADA_TOP.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


LLADA = Family(
    name="llada",
    model_type="llada",
    model_class=LlamaForCausalLM,
    make_config=_llada_config,
    fields=_FIELDS,
    rename=llada_rename,
    load_tokenizer=PreTrainedTokenizerFast.from_pretrained,
    shifted=False,
    end_of_turn="<|eot_id|>",
    chat_template=(
        "{{ bos_token or '' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
)
