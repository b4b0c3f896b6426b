"""Dream (arXiv 2508.15487): Qwen2's decoder with attention both ways, and logits shifted by one.

`Family` in base.py explains the fields.
"""

from typing import Any

from transformers import PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from rgrl.models.families.base import Family, require


def _dream_config(config: dict[str, Any]) -> PreTrainedConfig:
    require(
        config, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"), "Dream"
    )
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings rope_theta attention_dropout "
        "pad_token_id eos_token_id bos_token_id"
    ).split()
    return Qwen2Config(**{name: config[name] for name in names if name in config})


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
