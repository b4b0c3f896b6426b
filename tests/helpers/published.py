"""Real checkpoints as they are published: their config.json, from the Hub's pages; tiny ones of the same formats."""

from pathlib import Path

from checkpoints import write_a2d, write_dream, write_llada, write_reward

_QWEN = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}
_QWEN3 = {
    **_QWEN,
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_hidden_layers": 28,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
_QWEN3_06 = {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072}
_QWEN3_17 = {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144}

DREAM, LLADA = "Dream-org/Dream-v0-Instruct-7B", "GSAI-ML/LLaDA-8B-Instruct"
A2D = "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1"
SKYWORK_06, SKYWORK_17 = "Skywork/Skywork-Reward-V2-Qwen3-0.6B", "Skywork/Skywork-Reward-V2-Qwen3-1.7B"

POLICIES: dict[str, dict] = {
    DREAM: {
        **_QWEN,
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "mask_token_id": 151666,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "Dream",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "pad_token_id": 151643,
        "tie_word_embeddings": False,
        "transformers_version": "4.46.2",
        "use_mrope": False,
        "vocab_size": 152064,
    },
    LLADA: {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 4096,
        "embedding_dropout": 0.0,
        "embedding_size": 126464,
        "eos_token_id": 126081,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": 126336,
        "max_sequence_length": 4096,
        "mlp_hidden_size": 12288,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 32,
        "n_kv_heads": 32,
        "n_layers": 32,
        "pad_token_id": 126081,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": 126464,
        "weight_tying": False,
    },
    A2D: {
        **_QWEN3_06,
        "architectures": ["A2DQwen3LMHeadModel"],
        "auto_map": {"AutoConfig": "modeling_qwen3.A2DQwen3Config"},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "model_type": "a2d-qwen3",
    },
}
# What a tiny checkpoint of the same format has its own of.
SIZES = set(
    "architectures auto_map bos_token_id eos_token_id mask_token_id pad_token_id vocab_size embedding_size "
    "d_model hidden_size mlp_hidden_size intermediate_size n_layers num_hidden_layers n_heads num_attention_heads "
    "n_kv_heads num_key_value_heads max_sequence_length max_position_embeddings".split()
)
REWARDS: dict[str, dict] = {SKYWORK_06: _QWEN3_06, SKYWORK_17: _QWEN3_17}

# Trained and all weights, in millions: from the families' papers and cards, and by hand from the shapes above.
WEIGHTS = {DREAM: 7616, LLADA: 8016, A2D: 596, SKYWORK_06: 596, SKYWORK_17: 1721}


def write_tiny(hub_id: str, folder: Path) -> Path:
    """A tiny checkpoint of the same format as the one at `hub_id`, with room for long prompts."""
    if hub_id == DREAM:
        return write_dream(folder, max_position_embeddings=1024)
    if hub_id == LLADA:
        return write_llada(folder, max_sequence_length=1024)
    if hub_id == A2D:
        return write_a2d(folder, max_position_embeddings=1024)
    return write_reward(folder, seed=list(REWARDS).index(hub_id), positions=1024)
