"""Tiny reward models of many architectures: transformers' own classes with random weights."""

from pathlib import Path

import torch
import transformers
from checkpoints import TOKENIZER
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

VOCABULARY = 4096
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 4092,
}
ENCODER = {name: value for name, value in DECODER.items() if name not in ("num_key_value_heads", "head_dim")}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 4092}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False}
NEO = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8}
NEO |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "decoder_start_token_id": 0}
BART = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
BART |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
XLNET = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 4092}

# name -> (config class, its settings, how it must guide: "prefix_cached", "full", None for not at all; or "refused")
ARCHITECTURES = {
    # Causal, full attention
    "llama": ("LlamaConfig", DECODER, "prefix_cached"),
    "mistral": ("MistralConfig", DECODER | {"sliding_window": None}, "prefix_cached"),
    "qwen2": ("Qwen2Config", DECODER, "prefix_cached"),
    "qwen3": ("Qwen3Config", DECODER, "prefix_cached"),
    "phi3": ("Phi3Config", DECODER | {"sliding_window": None}, "prefix_cached"),
    "gpt_neox": ("GPTNeoXConfig", DECODER, "prefix_cached"),
    "gpt2": ("GPT2Config", GPT, "prefix_cached"),
    "gptj": ("GPTJConfig", GPT | {"rotary_dim": 4}, "prefix_cached"),
    "opt": (
        "OPTConfig",
        DECODER | {"ffn_dim": 48, "word_embed_proj_dim": 32, "activation_function": "gelu"},
        "prefix_cached",
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "full"),
    # Experts
    "mixtral": ("MixtralConfig", DECODER | MOE | {"sliding_window": None}, "prefix_cached"),
    # Scaled embeddings
    "gemma": ("GemmaConfig", DECODER, "prefix_cached"),
    # Windows
    "gpt_neo": ("GPTNeoConfig", NEO, "full"),
    "gemma2": ("Gemma2Config", DECODER | {"sliding_window": 8}, "full"),
    "gemma3": ("Gemma3TextConfig", DECODER | {"sliding_window": 8}, "full"),
    "qwen2 window": ("Qwen2Config", DECODER | WINDOW, "full"),
    "qwen3 window": ("Qwen3Config", DECODER | WINDOW, "full"),
    "mistral window": ("MistralConfig", DECODER | {"sliding_window": 8}, "full"),
    # Not only attention
    "jamba": ("JambaConfig", DECODER | MOE | JAMBA, "full"),
    # Encoders
    "bert": ("BertConfig", ENCODER, "full"),
    "roberta": ("RobertaConfig", ENCODER | {"pad_token_id": 1}, "full"),
    "distilbert": ("DistilBertConfig", DISTIL, "full"),
    "electra": ("ElectraConfig", ENCODER | {"embedding_size": 32}, "full"),
    "deberta": ("DebertaV2Config", ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "full"),
    "modernbert": ("ModernBertConfig", ENCODER | {"local_attention": 8, "global_attn_every_n_layers": 2}, "full"),
    "albert": ("AlbertConfig", ENCODER | {"embedding_size": 16}, "full"),
    # Encoder and decoder
    "t5": ("T5Config", T5, "refused"),
    "bart": ("BartConfig", BART, "refused"),
    # Padding changes what they read
    "fnet": ("FNetConfig", ENCODER, "refused"),
    "xlnet": ("XLNetConfig", XLNET, "refused"),
}


def write_architecture(folder: Path, name: str, pad: bool = True) -> Path:
    """A one-label classifier of that architecture with a tokenizer; `pad=False`: its config names no padding."""
    class_name, settings, _ = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**settings, num_labels=1)
    config.eos_token_id = config.bos_token_id = 4092
    config.pad_token_id = settings.get("pad_token_id", 4092) if pad else None
    torch.manual_seed(0)
    made = getattr(transformers, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[config.model_type])(config)
    for module in made.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.15)
    made.save_pretrained(folder)
    source = Qwen2Tokenizer.from_pretrained(TOKENIZER)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=source.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = source.chat_template
    tokenizer.save_pretrained(folder)
    return folder
