"""Tiny checkpoints in the authors' own formats, with random weights."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from rgrl.models.families import FAMILIES
from rgrl.models.families.dream import DREAM
from rgrl.models.families.llada import LLADA, llada_rename

REPO = Path(__file__).parents[2]
TOKENIZER = REPO / "recipes" / "reviews" / "policy"  # a Dream-format tokenizer of 4,096 tokens
PROMPTS = ["the plot of this film", "the acting is", "this movie", "as a thriller, it", "it's hard to", "despite the"]

_IDS = {"mask_token_id": 4093, "pad_token_id": 4092, "eos_token_id": 4092}
TINY_DREAM = {
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "model_type": "Dream",
    "vocab_size": 4100,  # more rows than tokens, as in Dream-7B
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    **_IDS,
}
TINY_LLADA = {
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "model_type": "llada",
    "vocab_size": 4096,
    "embedding_size": 4100,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "max_sequence_length": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "weight_tying": False,
    **_IDS,
}


def random_weights(family, config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under transformers' names, large enough that logits differ visibly between inputs."""
    torch.manual_seed(seed)
    made = family.make_config(config)
    made.is_causal = False
    model = family.model_class(made)
    return {k: torch.randn_like(v) * 0.15 if v.ndim > 1 else v.clone() for k, v in model.state_dict().items()}


def save(config: dict, weights: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """Write config.json and the weights: one file, or `shards` files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        return save_file(weights, folder / "model.safetensors")
    names, weight_map = sorted(weights), {}
    for i in range(shards):
        part = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: weights[n].contiguous() for n in names[i::shards]}, folder / part)
        weight_map |= dict.fromkeys(names[i::shards], part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_dream(folder: Path, seed: int = 0, shards: int = 1, **changes) -> Path:
    config = {**TINY_DREAM, **changes}
    save(config, random_weights(DREAM, config, seed), folder, shards)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def llada_name(name: str) -> str:
    """The authors' name of a tensor: the inverse of the renaming on load, found by trying every name they use."""
    blocks = ("attn_out", "q_proj", "k_proj", "v_proj", "attn_norm", "ff_norm", "ff_proj", "up_proj", "ff_out")
    known = [f"model.transformer.{top}.weight" for top in ("wte", "ln_f", "ff_out")]
    known += [f"model.transformer.blocks.{i}.{block}.weight" for i in range(8) for block in blocks]
    return next(original for original in known if llada_rename(original) == name)


def write_llada(folder: Path, seed: int = 0, shards: int = 1, **changes) -> Path:
    config = {**TINY_LLADA, **changes}
    save(config, {llada_name(k): v for k, v in random_weights(LLADA, config, seed).items()}, folder, shards)
    save_fast_tokenizer(folder)
    return folder


def save_fast_tokenizer(folder: Path, **more: str) -> None:
    """The recipes' tokenizer as a tokenizer.json, without a mask of its own unless `more` names one."""
    source = Qwen2Tokenizer.from_pretrained(TOKENIZER)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=source.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", **more
    )
    fast.chat_template = source.chat_template
    fast.save_pretrained(folder)


TINY_A2D = {
    "vocab_size": 4100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0",
    "use_cache": True,
    **_IDS,
}


def write_a2d(folder: Path, kind: str = "qwen3", seed: int = 0, shards: int = 1, **changes) -> Path:
    """An A2D checkpoint, as transformers writes one: a tied head is not in the file."""
    own = {"qwen3": {"head_dim": 16}, "qwen2": {}, "llama": {"attention_bias": True, "mlp_bias": True}}[kind]
    config = {**TINY_A2D, "model_type": f"a2d-{kind}", **own, **changes}
    weights = random_weights(FAMILIES[f"a2d-{kind}"], config, seed)
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight")
    save(config, weights, folder, shards)
    save_fast_tokenizer(folder, mask_token="<|mask|>")
    return folder


def shortened(source: Path, folder: Path) -> Path:
    """A checkpoint of one file with its first and its last layer only."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    last = config["num_hidden_layers"] - 1
    config["num_hidden_layers"] = 2
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][i] for i in (0, last)]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    kept = {
        k: v
        for k, v in weights.items()
        if not (found := re.search(r"layers\.(\d+)\.", k)) or int(found[1]) in (0, last)
    }
    save_file({k.replace(f"layers.{last}.", "layers.1."): v for k, v in kept.items()}, folder / "model.safetensors")
    return folder


def with_code(folder: Path, name: str) -> Path:
    """Lay the skeletons of a family's own classes into a checkpoint, as its authors do with their code."""
    for path in (REPO / "tests" / "helpers" / "authors").glob(f"*_{name}.py"):
        shutil.copy(path, folder / path.name)
    return folder


def write_reward(
    folder: Path, seed: int = 1, labels: int = 1, template: str | None = None, positions: int = 128
) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=4100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=positions,
        num_labels=labels,
        pad_token_id=4092,
    )
    model = Qwen3ForSequenceClassification(config)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
    model.save_pretrained(folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)  # fails if transformers cannot load what was written
    return folder
