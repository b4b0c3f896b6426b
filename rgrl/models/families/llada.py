"""LLaDA (arXiv 2502.09992): Llama's decoder with attention both ways, under tensor names of its own.

`Family` in base.py explains the fields.
"""

import re
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from rgrl.models.families.base import Family, require


def _llada_config(config: dict[str, Any]) -> PreTrainedConfig:
    require(config, ("d_model", "n_heads", "n_layers", "mlp_hidden_size"), "LLaDA")
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
