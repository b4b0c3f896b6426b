"""The recipe's two policies: sizes, tokenizers and checkpoint formats. Used by `build.py` alone."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import corpus
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from rgrl.models import Policy
from rgrl.models.families import DREAM, LLADA, Family
from rgrl.rewards.bridge import bridge_embeddings


@dataclass(frozen=True)
class PolicyRecipe:
    """What distinguishes one policy from the other. Special tokens are the last of the vocabulary."""

    name: str  # of its training state and its random draws
    folder: str
    family: Family
    specials: list[str]
    end: list[str]  # what ends a completion before the end-of-text that pads it
    completion: int  # tokens; a completion is padded to as many with end-of-text
    rows: int  # of a step
    first_steps: int
    second_steps: int
    config: Callable[[PreTrainedTokenizerBase], dict]
    text: Callable[[list[corpus.Snippet], list[str]], list[str]]  # known snippets, prose -> what merges are learnt from
    build_tokenizer: Callable[[list[str], Path], None]
    start: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Policy], None] | None = None  # from the first policy


# ------------------------------------------------------------------------------------------------------ Dream
VOCAB = 4096
SPECIALS = ["<|endoftext|>", "<|mask|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_dream_tokenizer(texts: list[str], out: Path) -> None:
    """Byte-level BPE with Qwen2's own splitting rules, saved the way that Dream ships its tokenizer."""
    fresh = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(SPECIALS[:1])}, merges=[])
    trained = fresh.train_new_from_iterator(texts, vocab_size=VOCAB - len(SPECIALS) + 1, show_progress=False)
    out.mkdir(parents=True, exist_ok=True)
    full = json.loads(trained.backend_tokenizer.to_str())["model"]
    vocab = sorted((t for t in full["vocab"] if t not in SPECIALS), key=full["vocab"].__getitem__)
    ids = {token: i for i, token in enumerate(vocab)}
    merges = [m if isinstance(m, str) else " ".join(m) for m in full["merges"]]
    (out / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(len(ids) + i): {"content": t, **special} for i, t in enumerate(SPECIALS)},
        "eos_token": SPECIALS[0],
        "pad_token": SPECIALS[0],
        "mask_token": SPECIALS[1],
        "additional_special_tokens": SPECIALS[2:],
        "chat_template": TEMPLATE,
        "model_max_length": 256,
        "add_prefix_space": False,
        "unk_token": None,
        "bos_token": None,
        "errors": "replace",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def dream_config(tokenizer: PreTrainedTokenizerBase) -> dict:
    """A Dream `config.json`, the authors' field names, at toy size."""
    return {
        "architectures": ["DreamModel"],
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "model_type": "Dream",
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "torch_dtype": "bfloat16",
    }


def dream_text(known: list[corpus.Snippet], prose: list[str]) -> list[str]:
    return [s.text for s in known for _ in range(4 if s.source == "movie" else 1)] + prose


# ------------------------------------------------------------------------------------------------------ LLaDA
LLADA_VOCAB = 5000
KEPT = (0, 1, 4)  # layers of the first policy; without the others it loses 0.4 nats a token, least of any three
LLADA_SPECIALS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
# Words with what an apostrophe or a hyphen joins to them are one piece, so that merges run across places where the
# other tokenizers (Qwen2's rules) always cut: "doesn't", "well-made".
PIECES = r" ?\p{L}+(?:['-]\p{L}+)*|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def build_llada_tokenizer(texts: list[str], out: Path) -> None:
    """Byte-level BPE with special tokens by LLaDA's names at the end, as one tokenizer.json. The mask has no role."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = LLADA_VOCAB - len(LLADA_SPECIALS)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    turn = ["user\n\n", "assistant\n\n"] * 100  # what the chat format writes beside special tokens
    tokenizer.train_from_iterator(texts + turn, trainer)
    tokenizer.add_special_tokens(LLADA_SPECIALS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=LLADA_SPECIALS[0],
        eos_token=LLADA_SPECIALS[1],
        pad_token=LLADA_SPECIALS[1],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = LLADA.chat_template
    fast.save_pretrained(out)


def llada_config(tokenizer: PreTrainedTokenizerBase) -> dict:
    """A LLaDA `config.json`, the authors' field names, at toy size."""
    return {
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "model_type": "llada",
        "vocab_size": LLADA_VOCAB,
        "embedding_size": LLADA_VOCAB,
        "d_model": 256,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": len(KEPT),
        "mlp_hidden_size": 704,
        "max_sequence_length": 256,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 10000.0,
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "scale_logits": False,
        "weight_tying": True,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "mask_token_id": tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "torch_dtype": "bfloat16",
    }


def llada_text(known: list[corpus.Snippet], prose: list[str]) -> list[str]:
    """The rated text alone: reviews, editorials and tweets, without the tales and the dialogue."""
    return [s.text for s in known]


@torch.no_grad()
def start_from_first(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, first: Policy) -> None:
    """Fill `model` with three layers of the first policy, and with its embeddings by way of the bridge.

    Each token starts as the mean of the tokens that spell it there. The biases of queries, keys and values have no
    place here, and the first policy scores a token at the place before it, so all of this has to be learnt anew, but
    from a start that knows words.
    """
    table_VD, _ = bridge_embeddings(
        tokenizer, first.tokenizer, first.causal_lm.get_input_embeddings().weight, LLADA_VOCAB, "compose"
    )
    own = model.get_input_embeddings().weight
    filled_V = table_VD.abs().sum(1) > 0  # the others, special tokens, keep their random start
    own[filled_V] = table_VD[filled_V]
    own[tokenizer.convert_tokens_to_ids("<|mdm_mask|>")] = first.causal_lm.get_input_embeddings().weight[first.mask_id]
    own[tokenizer.convert_tokens_to_ids("<|eot_id|>")] = first.causal_lm.get_input_embeddings().weight[first.eos_id]
    for i, kept in enumerate(KEPT):
        theirs = first.causal_lm.model.layers[kept].state_dict()
        mine = model.model.layers[i].state_dict()
        model.model.layers[i].load_state_dict({name: theirs[name] for name in mine})
    model.model.norm.load_state_dict(first.causal_lm.model.norm.state_dict())


# ----------------------------------------------------------------------------------------------------- writing
POLICIES = [
    PolicyRecipe(
        name="policy",
        folder="policy",
        family=DREAM,
        specials=SPECIALS,
        end=[],
        completion=32,
        rows=64,
        first_steps=2800,
        second_steps=1600,
        config=dream_config,
        text=dream_text,
        build_tokenizer=build_dream_tokenizer,
    ),
    PolicyRecipe(
        name="policy_llada",
        folder="policy_llada",
        family=LLADA,
        specials=LLADA_SPECIALS,
        end=["<|eot_id|>"],
        completion=24,
        rows=32,
        first_steps=0,
        second_steps=600,
        config=llada_config,
        text=llada_text,
        build_tokenizer=build_llada_tokenizer,
        start=start_from_first,
    ),
]


def authors_names(family: Family, names: list[str], layers: int) -> dict[str, str]:
    """A checkpoint's own name of each tensor of transformers' class: the renaming on load, backwards."""
    if family is DREAM:
        return {name: name for name in names}
    blocks = "attn_out q_proj k_proj v_proj attn_norm ff_norm ff_proj up_proj ff_out".split()
    own = [f"model.transformer.{top}.weight" for top in ("wte", "ln_f", "ff_out")]
    own += [f"model.transformer.blocks.{i}.{block}.weight" for i in range(layers) for block in blocks]
    back = {family.rename(name): name for name in own}
    return {name: back[name] for name in names}


def checkpoint(recipe: PolicyRecipe, model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of `model`, whose head is its embeddings, as the checkpoint stores them."""
    import torch

    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    names = authors_names(recipe.family, list(state), model.config.num_hidden_layers)
    return {names[k]: v.to(torch.bfloat16).contiguous() for k, v in state.items()}
