"""What is loaded is used whole or refused by name: adapters, configs, weights, tokens."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import peft
import published
import pytest
import torch
from checkpoints import TOKENIZER, write_dream, write_llada, write_reward
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rgrl.checkpoint import load_adapter
from rgrl.checkpoint.format import adapter_of
from rgrl.config import LoraConfig
from rgrl.errors import ConfigError
from rgrl.models import load_policy
from rgrl.models.adapter import merge_adapter
from rgrl.models.families import DREAM
from rgrl.models.families.fields import check_fields, fields_of
from rgrl.models.lora import add_lora
from rgrl.rewards import load_classifier
from rgrl.types import Prompts

Spoil = Callable[[Path], object]


def edit_json(name: str, **changes: object) -> Spoil:
    """Set keys of a JSON file; None takes a key out."""

    def edit(folder: Path) -> None:
        tree = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))

    return edit


def edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """`change` edits the tensors of a file in place."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, {"format": "pt"})

    return edit


def remade(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    """The first tensor whose name holds `part`, made into another."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if part in name)
        tensors[name] = make(tensors[name])

    return change


def spoilt(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One value in the middle of a tensor."""

    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return make


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if old in name)
        tensors[name.replace(old, new)] = tensors.pop(name)

    return change


# ---------------------------------------------------------------------------------------------------- adapters
def as_pickle(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


def in_adapter(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    return edit_tensors("adapter_model.safetensors", change)


def says(**changes: object) -> Spoil:
    return edit_json("adapter_config.json", **changes)


# name, what is spoiled, words of the message
ADAPTERS: list[tuple[str, Spoil, list[str]]] = [
    (
        "a tensor more",
        in_adapter(lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(2)})),
        ["x.lora_A"],
    ),
    ("another layer", in_adapter(renamed("layers.0", "layers.7")), ["layers.7.", "no place in this model"]),
    ("no prefix", in_adapter(renamed("base_model.model.", "")), ["no place in this model"]),
    ("a tensor less", in_adapter(lambda t: t.pop(min(t))), ["lacks base_model.model.model.layers.0."]),
    ("no tensors", in_adapter(lambda t: t.clear()), ["lacks base_model.model.model.layers.0."]),
    ("another rank", in_adapter(remade("lora_A", lambda t: t[:3])), ["lora_A.weight has shape (3, ", "implies (4, "]),
    ("another width", in_adapter(remade("lora_B", lambda t: t[:8])), ["lora_B.weight has shape (8, 4)", "implies"]),
    ("NaN", in_adapter(remade("lora_B", spoilt(float("nan")))), ["lora_B.weight holds NaN values"]),
    ("infinite", in_adapter(remade("lora_A", spoilt(float("-inf")))), ["lora_A.weight holds infinite values"]),
    ("integers", in_adapter(remade("lora_A", lambda t: t.to(torch.int8))), ["lora_A.weight is stored as I8"]),
    ("fp8", in_adapter(remade("lora_A", lambda t: t.to(torch.float8_e4m3fn))), ["stored as F8_E4M3"]),
    ("a pickle", as_pickle, ["adapter_model.bin, a pickle", "adapter_model.safetensors"]),
    ("no weights", lambda f: (f / "adapter_model.safetensors").unlink(), ["no weights"]),
    ("no settings", lambda f: (f / "adapter_config.json").unlink(), ["no adapter_config.json"]),
    (
        "a pickle by that name",
        lambda f: (f / "adapter_model.safetensors").write_bytes(pickle.dumps({})),
        ["not a readable safetensors file"],
    ),
    ("cut", lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 20), ["not a readable safetensors file"]),
    ("IA3", says(peft_type="IA3"), ["`peft_type` is 'IA3'", "LORA"]),
    ("no kind", says(peft_type=None), ["`peft_type` is None"]),
    ("a setting of a later peft", says(use_hydra=True), ["`use_hydra` is true"]),
    ("activated LoRA", says(alora_invocation_tokens=[1, 2]), ["`alora_invocation_tokens` is [1, 2]"]),
    ("PiSSA", says(init_lora_weights="pissa_niter_4"), ["`init_lora_weights` is 'pissa_niter_4'"]),
    ("a rank that is none", says(r=0), ["does not describe a LoRA adapter"]),
]
# These hold for models that take the adapter's own settings, and not for one that has got its adapter already.
REWARD_ADAPTERS: list[tuple[str, Spoil, list[str]]] = [
    ("rank in settings", says(r=8), ["has shape (4, 32), this model implies (8, 32)"]),
    ("targets that are none", says(target_modules=["query"]), ["does not fit Qwen3ForSequenceClassification"]),
    ("fewer targets", says(target_modules=["q_proj"]), ["no place in this model"]),
    ("biases", says(bias="all", target_modules=["k_proj"]), ["no place in this model"]),
]


def draw(parameters) -> None:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=rng))


@pytest.fixture(scope="module")
def adapted(reward_dir):
    base = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS"))
    draw(p for p in model.parameters() if p.requires_grad)
    return model.eval()


@pytest.mark.parametrize(
    ("spoil", "words"), [c[1:] for c in ADAPTERS + REWARD_ADAPTERS], ids=[c[0] for c in ADAPTERS + REWARD_ADAPTERS]
)
def test_a_reward_adapter_that_does_not_fit_is_refused(spoil, words, adapted, reward_dir, tmp_path):
    adapted.save_pretrained(tmp_path)
    spoil(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    with pytest.raises(ConfigError) as error:
        merge_adapter(base, tmp_path, f"`reward.adapter` {tmp_path}")
    message = str(error.value)
    assert "`reward.adapter`" in message and not [word for word in words if word not in message], message


@pytest.mark.parametrize("change", [{}, {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_kinds_of_lora_are_merged_as_peft_does(change, reward_dir, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS", **change)
    model = peft.get_peft_model(base, config)
    draw(p for n, p in model.named_parameters() if p.requires_grad and "magnitude" not in n)
    model.eval().save_pretrained(tmp_path)
    ids = torch.arange(100, 120)[None]
    merged = load_classifier(reward_dir, adapter=str(tmp_path)).model
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    before = torch.random.get_rng_state()
    merge_adapter(AutoModelForSequenceClassification.from_pretrained(reward_dir), tmp_path, "it")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture(scope="module")
def with_lora(dream_dir):
    return add_lora(load_policy(dream_dir), LoraConfig(r=4), seed=0)


@pytest.mark.parametrize(("spoil", "words"), [c[1:] for c in ADAPTERS], ids=[c[0] for c in ADAPTERS])
def test_a_checkpoints_adapter_that_does_not_fit_is_refused(spoil, words, with_lora, tmp_path):
    folder = tmp_path / "adapter"
    with_lora.peft_model.save_pretrained(folder)
    spoil(folder)
    before = {name: p.clone() for name, p in adapter_of(with_lora).items()}
    with pytest.raises(ConfigError) as error:
        load_adapter(tmp_path, with_lora)
    message = str(error.value)
    assert f"cannot resume {tmp_path}" in message and not [word for word in words if word not in message], message
    assert all(torch.equal(p, before[name]) for name, p in adapter_of(with_lora).items())


# ---------------------------------------------------------------------------------------------- policies: configs
def settings(hub_id: str) -> dict:
    """Of the published config.json all that is no size, so that a tiny model can take it."""
    return {key: value for key, value in published.POLICIES[hub_id].items() if key not in published.SIZES}


def test_the_published_configs_are_understood(tmp_path):
    assert load_policy(write_dream(tmp_path / "d", **settings(published.DREAM))).causal_lm.config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": 1000000.0,
    }
    assert load_policy(write_llada(tmp_path / "l", **settings(published.LLADA))).causal_lm.config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": 500000.0,
    }


def test_the_configs_of_the_recipes_are_understood():
    config = json.loads((TOKENIZER / "config.json").read_text())
    check_fields(config, DREAM.fields, "dream")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Changes to a tiny Dream: what they mean is what transformers' own reading of the same file makes of it.
USED_OR_REFUSED: dict[str, dict] = {
    "base, old spelling": {"rope_theta": 500.0},
    "base, new spelling": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "base, both spellings": {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "no base": {"rope_theta": None},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, whole": {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 500}, "rope_theta": 500.0},
    "yarn": {"rope_scaling": YARN},
    "yarn, more": {"rope_scaling": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5}},
    "llama3": {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "activation": {"hidden_act": "gelu"},
    "norm": {"rms_norm_eps": 0.1},
    "key heads": {"num_key_value_heads": 4},
    "a key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "window that is off": {"sliding_window": 2, "use_sliding_window": False, "max_window_layers": 0},
    "width of a head": {"head_dim": 8},
    "layers": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
    "metadata": {"temperature": 0.2, "id2label": {"0": "x"}, "_name_or_path": "x", "dtype": "float16", "a_null": None},
}


def own_logits(folder: Path, ids_L: torch.Tensor) -> torch.Tensor:
    """logits_LV by transformers' own reading of a Dream folder as Qwen2, unmasked and shifted by hand."""
    raw = json.loads((folder / "config.json").read_text())
    config = Qwen2Config(**{k: v for k, v in raw.items() if v is not None and k not in ("model_type", "auto_map")})
    config.is_causal = False
    weights = load_file(folder / "model.safetensors")
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(weights, strict=not config.tie_word_embeddings)
    everything = torch.ones(1, 1, len(ids_L), len(ids_L), dtype=torch.bool)
    logits_LV = model(ids_L[None], attention_mask=everything).logits[0]
    return torch.cat([logits_LV[:1], logits_LV[:-1]])


@pytest.mark.parametrize("name", USED_OR_REFUSED)
def test_what_is_honoured_is_what_transformers_makes_of_it(name, tmp_path, dream_dir):
    folder = write_dream(tmp_path / "m", **USED_OR_REFUSED[name])
    if name == "tied":
        in_model(lambda t: t.pop("lm_head.weight"))(folder)
    policy, ids_L = load_policy(folder), torch.arange(100, 148)
    others = torch.arange(policy.vocab_size) != policy.mask_id
    ours_LV = policy.logits(ids_L[None], torch.ones(1, 48, dtype=torch.bool))[0][:, others]
    expected_LV = own_logits(folder, ids_L)[:, : policy.vocab_size][:, others]
    torch.testing.assert_close(ours_LV, expected_LV, rtol=0, atol=2e-5)
    if name not in ("no base", "window that is off", "width of a head", "metadata"):  # they say what holds anyway
        plain_LV = load_policy(dream_dir).logits(ids_L[None], torch.ones(1, 48, dtype=torch.bool))[0][:, others]
        assert (ours_LV - plain_LV).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 500.0}}, {"rope_theta": 500.0}),
        ({"n_kv_heads": None, "multi_query_attention": True}, {"n_kv_heads": 1}),
        ({"n_kv_heads": None, "multi_query_attention": False}, {"n_kv_heads": 4}),
        ({"n_kv_heads": None}, {"n_kv_heads": 4}),
        ({"embedding_size": None, "vocab_size": 4100}, {}),
        ({"rope_full_precision": False, "max_sequence_length": 64, "tie_word_embeddings": False}, {}),
    ],
)
def test_two_spellings_of_a_llada_model(changes, same, tmp_path):
    ids = torch.arange(100, 120)[None], torch.ones(1, 20, dtype=torch.bool)
    one, other = (load_policy(write_llada(tmp_path / str(i), **c)).logits(*ids) for i, c in enumerate((changes, same)))
    assert torch.equal(one, other)


# name, family, changes to config.json, words of the message
REFUSED: list[tuple[str, str, dict, list[str]]] = [
    ("unknown field", "dream", {"rope_scaling_factor": 2.0}, ["`rope_scaling_factor` (2.0)", "not known to dream"]),
    ("unknown false field", "dream", {"use_rope": False}, ["`use_rope` (false)"]),
    ("softcap", "dream", {"final_logit_softcapping": 30.0}, ["`final_logit_softcapping` (30.0)"]),
    ("another family's field", "dream", {"scale_logits": False}, ["`scale_logits`"]),
    ("window", "dream", {"use_sliding_window": True, "sliding_window": 8}, ["`use_sliding_window` is true", "false"]),
    ("windowed layers", "dream", {"layer_types": ["full_attention", "sliding_attention"]}, ["`layer_types`"]),
    ("mrope", "dream", {"use_mrope": True}, ["`use_mrope` is true"]),
    ("wide heads", "dream", {"head_dim": 16}, ["`head_dim` is 16", "8"]),
    ("dropout", "dream", {"attention_dropout": 0.1}, ["`attention_dropout` is 0.1", "0.0"]),
    ("activation", "dream", {"hidden_act": "sine"}, ["`hidden_act` is 'sine'"]),
    ("part of a head", "dream", {"partial_rotary_factor": 0.5}, ["`partial_rotary_factor` is 0.5"]),
    ("no bias", "dream", {"attention_bias": False}, ["`attention_bias` is false", "true"]),
    ("encoder", "dream", {"is_encoder_decoder": True}, ["`is_encoder_decoder` is true"]),
    ("causal", "llada", {"is_causal": True}, ["`is_causal` is true"]),
    ("pruned", "dream", {"pruned_heads": {"0": [1]}}, ["`pruned_heads`"]),
    ("dynamic", "dream", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["`rope_scaling`", "dynamic", "yarn"]),
    ("mrope kind", "dream", {"rope_scaling": {"type": "mrope", "mrope_section": [2]}}, ["`rope_scaling`", "mrope"]),
    ("two kinds", "dream", {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, ["linear"]),
    ("no factor", "dream", {"rope_scaling": {"rope_type": "linear"}}, ["`rope_scaling`", "lacks `factor`"]),
    ("odd factor", "dream", {"rope_scaling": {"type": "linear", "factor": "2"}}, ["`rope_scaling.factor`", '"2"']),
    ("small factor", "dream", {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["`rope_scaling.factor` is 0.5"]),
    ("turned factors", "dream", {"rope_scaling": {**LLAMA3, "low_freq_factor": 9.0}}, ["must be below", "(4.0)"]),
    ("half a position", "dream", {"rope_scaling": {**YARN, "original_max_position_embeddings": 16.5}}, ["is 16.5"]),
    ("narrow heads", "dream", {"num_attention_heads": 32, "num_key_value_heads": 16}, ["32 heads of 1 numbers"]),
    ("a key more", "dream", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, ["`rope_parameters.factor`"]),
    ("by layer", "dream", {"rope_parameters": {"full_attention": {}}}, ["`rope_parameters.full_attention`"]),
    ("no object", "dream", {"rope_scaling": "linear"}, ["`rope_scaling`", "expected an object"]),
    ("two bases", "dream", {"rope_parameters": {"rope_theta": 500.0}}, ["two bases", "10000", "500"]),
    (
        "two scalings",
        "dream",
        {"rope_parameters": YARN, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ["`rope_scaling` and `rope_parameters` disagree"],
    ),
    ("base of zero", "llada", {"rope_theta": 0}, ["`rope_theta` is 0"]),
    ("NaN", "llada", {"rms_norm_eps": float("nan")}, ["`rms_norm_eps` is NaN"]),
    ("text for a number", "dream", {"rms_norm_eps": "1e-6"}, ['`rms_norm_eps` is "1e-6"']),
    ("half a layer", "dream", {"num_hidden_layers": 2.0}, ["`num_hidden_layers` is 2.0"]),
    ("true heads", "llada", {"n_heads": True}, ["`n_heads` is true"]),
    ("tied by a word", "llada", {"weight_tying": "no"}, ['`weight_tying` is "no"']),
    ("two ties", "llada", {"tie_word_embeddings": True}, ["`weight_tying` and `tie_word_embeddings` disagree"]),
    ("LLaDA scaled", "llada", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["`rope_scaling`", "linear"]),
    ("LLaDA scaled anew", "llada", {"rope_parameters": YARN}, ["`rope_parameters`", "yarn"]),
    ("two head counts", "llada", {"multi_query_attention": True}, ["`n_kv_heads` (4) and `multi_query_attention`"]),
    *[
        (f"{field} {value}", "llada", {field: value}, [f"`{field}` is", "supported with"])
        for field, values in {
            "block_type": ["sequential"],
            "block_group_size": [2],
            "activation_type": ["swiglu", "gelu"],
            "layer_norm_type": ["default", "low_precision"],
            "layer_norm_with_affine": [False],
            "attention_layer_norm": [True],
            "input_emb_norm": [True],
            "scale_logits": [True],
            "rope": [False],
            "alibi": [True],
            "include_bias": [True],
            "include_qkv_bias": [True],
            "bias_for_layer_norm": [True],
            "clip_qkv": [8.0],
            "attention_dropout": [0.1],
            "residual_dropout": [0.1],
            "embedding_dropout": [0.1],
        }.items()
        for value in values
    ],
    ("quantized", "dream", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantized", "gptq"]),
    ("compressed", "llada", {"compression_config": {"format": "int"}}, ["quantized", "`compression_config`"]),
    # Sizes that nobody has the memory for, or that never end
    ("a million layers", "dream", {"num_hidden_layers": 10**6}, ["1000000", "at most 2 layers"]),
    ("a million layers", "llada", {"n_layers": 10**6}, ["1000000", "at most 2 layers"]),
    ("a layer less", "dream", {"num_hidden_layers": 1}, ["1 layers and the weights 2"]),
    ("a wide model", "dream", {"hidden_size": 10**9}, ["has shape (4100, 32)", "(4100, 1000000000)"]),
    ("a wide layer", "llada", {"mlp_hidden_size": 10**9}, ["ff_proj", "(1000000000, 32)"]),
    ("many tokens", "dream", {"vocab_size": 10**9}, ["(1000000000, 32)"]),
    ("more than there are", "dream", {"intermediate_size": 10**30}, ["`intermediate_size`"]),
    ("many heads", "llada", {"n_heads": 10**9, "n_kv_heads": 10**9}, ["config.json"]),
    ("no layers", "dream", {"num_hidden_layers": 0}, ["`num_hidden_layers` is 0"]),
    ("heads that do not divide", "dream", {"num_key_value_heads": 3}, ["k_proj", "config.json implies (24, 32)"]),
    # Tokens
    ("mask is the end", "dream", {"mask_token_id": 4092}, ["4092 in config.json", "4093 (<|mask|>) in the tokenizer"]),
    ("mask is the end", "llada", {"mask_token_id": 4092}, ["mask token 4092 (<|endoftext|>)", "also the end token"]),
    ("mask is a word", "llada", {"mask_token_id": 300}, ["mask token 300", "ordinary"]),
    ("mask is padding", "llada", {"pad_token_id": 4093}, ["mask token 4093", "also the padding token"]),
    ("mask begins", "llada", {"bos_token_id": 4093}, ["mask token 4093", "also the begin token"]),
    ("mask ends", "llada", {"eos_token_id": [4092, 4093]}, ["mask token 4093", "also the end token"]),
    ("another mask", "dream", {"mask_token_id": 4094}, ["4094 in config.json", "4093 (<|mask|>) in the tokenizer"]),
    ("mask that is text", "llada", {"mask_token_id": "<|mask|>"}, ["'<|mask|>'", "the number of a token"]),
    ("negative mask", "llada", {"mask_token_id": -1}, ["mask token -1"]),
    ("end is a word", "dream", {"eos_token_id": 300}, ["`eos_token_id` is 300", "no special token"]),
]


@pytest.mark.parametrize(
    ("family", "changes", "words"), [case[1:] for case in REFUSED], ids=[f"{c[1]}: {c[0]}" for c in REFUSED]
)
def test_what_is_not_honoured_is_refused_by_name(family, changes, words, dream_dir, llada_dir, tmp_path):
    folder = Path(shutil.copytree({"dream": dream_dir, "llada": llada_dir}[family], tmp_path / "m"))
    edit_json("config.json", **changes)(folder)
    start = time.perf_counter()
    refused(lambda: load_policy(folder), [str(folder), *words])
    assert time.perf_counter() - start < 5


def refused(load: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load()
    message = str(error.value)
    assert "\n" not in message and not [word for word in words if word not in message], message


def test_a_mask_beyond_the_embeddings_is_refused(tmp_path):
    folder = write_dream(tmp_path / "m", vocab_size=4093)
    refused(lambda: load_policy(folder), ["mask token 4093", "beyond the model's 4093 embeddings"])


def test_an_added_word_is_no_mask(llada_dir, tmp_path):
    folder = Path(shutil.copytree(llada_dir, tmp_path / "m"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["masque", "[masque]"])
    tokenizer.save_pretrained(folder)
    edit_json("config.json", mask_token_id=4096)(folder)
    refused(lambda: load_policy(folder), ["mask token 4096 (masque)", "ordinary"])
    edit_json("config.json", mask_token_id=4097)(folder)
    assert load_policy(folder).mask_id == 4097


def test_the_ends_that_config_json_names_end_a_completion(tmp_path):
    policy = load_policy(write_dream(tmp_path / "m", eos_token_id=[4092, 4095]))
    assert policy.end_ids == (4092, 4095)
    assert policy.is_end(torch.tensor([4094, 4095])).tolist() == [False, True]


def test_a_field_said_twice_is_refused(dream_dir, tmp_path):
    folder = Path(shutil.copytree(dream_dir, tmp_path / "m"))
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rope_theta"', '"rope_theta": 5.0, "rope_theta"'))
    refused(lambda: load_policy(folder), ["config.json", "`rope_theta` twice"])


def test_a_family_that_declares_no_fields_knows_those_of_its_class():
    fields = fields_of(Qwen2Config())
    check_fields({"rope_theta": 1.0, "hidden_size": 3, "sliding_window": 4, "use_cache": True}, fields, "mine")
    refused(lambda: check_fields({"clip_qkv": 8.0}, fields, "mine"), ["`clip_qkv` (8.0)", "mine"])


# ---------------------------------------------------------------------------------------------- policies: weights
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def in_model(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    return edit_tensors(MODEL, change)


def in_index(change: Callable[[dict[str, str]], object]) -> Spoil:
    def edit(folder: Path) -> None:
        tree = json.loads((folder / INDEX).read_text())
        change(tree["weight_map"])
        (folder / INDEX).write_text(json.dumps(tree))

    return edit


def moved_out(absolute: bool) -> Spoil:
    """A shard beside the folder, and an index that leads there."""

    def move(folder: Path) -> None:
        there = (folder / FIRST).rename(folder.parent / "other.safetensors")
        name = str(there) if absolute else "../other.safetensors"
        in_index(lambda places: places.update({k: name for k, v in places.items() if v == FIRST}))(folder)

    return move


def shared_tensor(folder: Path) -> None:
    """A tensor of the first shard also in the second, with another value."""
    first = load_file(folder / FIRST)
    name = min(first)
    save_file(load_file(folder / SECOND) | {name: first[name] + 1}, folder / SECOND)


# name, shards, what is spoiled, words of the message
WEIGHTS: list[tuple[str, int, Spoil, list[str]]] = [
    ("int8", 1, in_model(remade("up_proj", lambda t: t.to(torch.int8))), ["up_proj.weight is stored as I8"]),
    ("bool", 1, in_model(remade("norm", lambda t: t > 0)), ["is stored as BOOL"]),
    ("fp8", 1, in_model(remade("up_proj", lambda t: t.to(torch.float8_e4m3fn))), ["stored as F8_E4M3", "F32"]),
    ("complex", 1, in_model(remade("up_proj", lambda t: t.to(torch.complex64))), ["stored as C64"]),
    ("NaN", 1, in_model(remade("down_proj", spoilt(float("nan")))), ["down_proj.weight holds NaN"]),
    ("infinite", 1, in_model(remade("norm", spoilt(float("inf")))), ["norm.weight holds infinite"]),
    ("infinite once cast", 1, in_model(remade("norm", lambda t: spoilt(1e300)(t.double()))), ["holds infinite"]),
    (
        "both infinities",
        1,
        in_model(remade("q_proj.w", lambda t: spoilt(float("-inf"))(t + 1 / (t != t[0])))),
        ["hold"],
    ),
    ("no head", 1, in_model(lambda t: t.pop("lm_head.weight")), ["no head", "does not tie it"]),
    ("no embedding", 1, in_model(lambda t: t.pop("model.embed_tokens.weight")), ["missing", "embed_tokens"]),
    (
        "another prefix",
        1,
        in_model(lambda t: [t.update({"x." + k: t.pop(k)}) for k in list(t)]),
        ["27 unknown", "x.lm_"],
    ),
    ("a tensor more", 1, in_model(lambda t: t.update({"model.norm.bias": torch.ones(32)})), ["unknown", "norm.bias"]),
    ("a scale more", 1, in_model(lambda t: t.update({"model.layers.1.mlp.up_proj.scale": torch.ones(1)})), ["scale"]),
    ("a layer less", 1, in_model(renamed("layers.0.mlp.up", "layers.9.mlp.up")), ["2 layers and the weights 3"]),
    (
        "a gap",
        1,
        in_model(lambda t: [t.update({k.replace("rs.1", "rs.2"): t.pop(k)}) for k in sorted(t) if "rs.1" in k]),
        ["2 layers and the weights 2", "layer 1 is missing"],
    ),
    ("another shape", 1, in_model(remade("k_proj.bias", lambda t: t[:8])), ["(8,)", "implies (16,)"]),
    ("transposed", 1, in_model(remade("up_proj", lambda t: t.T)), ["(32, 48)", "implies (48, 32)"]),
    (
        "a head that is tied away",
        1,
        edit_json("config.json", tie_word_embeddings=True),
        ["ties the head", "lm_head.weight is another matrix"],
    ),
    ("out of the folder", 2, moved_out(False), [INDEX, "'../other.safetensors'"]),
    ("an absolute path", 2, moved_out(True), [INDEX, "other.safetensors'"]),
    (
        "a file that is none",
        2,
        in_index(lambda p: p.update({k: "pytorch_model.bin" for k in p})),
        ["pytorch_model.bin"],
    ),
    ("a number for a file", 2, in_index(lambda p: p.update({"lm_head.weight": 1})), [INDEX, "weight_map"]),
    ("an empty index", 2, in_index(lambda p: p.clear()), [INDEX, "weight_map"]),
    ("an index of nothing", 2, lambda f: (f / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    ("shared", 2, shared_tensor, ["is in model-00002", "in model-00001"]),
    ("not listed", 2, in_index(lambda p: p.pop("lm_head.weight")), ["lm_head.weight is in", "nowhere"]),
    ("listed for nothing", 2, in_index(lambda p: p.update({"x": FIRST})), ["x is not in model-00001"]),
    ("no index", 2, lambda f: (f / INDEX).unlink(), ["no weights", MODEL, INDEX]),
    ("a shard less", 2, lambda f: (f / SECOND).unlink(), ["no weights", SECOND]),
    ("cut", 2, lambda f: os.truncate(f / SECOND, 3000), [SECOND, "not a readable safetensors file"]),
    ("a pickle", 1, lambda f: (f / MODEL).rename(f / "pytorch_model.bin"), ["no weights", "pickle"]),
    ("an adapter", 1, lambda f: (f / "adapter_config.json").write_text("{}"), ["adapter_config.json"]),
]


@pytest.mark.parametrize(("shards", "spoil", "words"), [c[1:] for c in WEIGHTS], ids=[c[0] for c in WEIGHTS])
def test_weights_that_are_not_the_configs_are_refused(shards, spoil, words, tmp_path):
    folder = write_dream(tmp_path / "m", shards=shards)
    spoil(folder)
    refused(lambda: load_policy(folder), words)


def test_of_two_sets_of_weights_the_one_file_is_read(tmp_path):
    folder = write_dream(tmp_path / "m", seed=1, shards=2)
    write_dream(tmp_path / "one", seed=2)
    shutil.copy(tmp_path / "one" / MODEL, folder / MODEL)
    for stray in ("aaa.safetensors", "zzz.safetensors"):  # in no index
        (folder / stray).write_bytes(b"no weights")
    ids = torch.arange(100, 120)[None], torch.ones(1, 20, dtype=torch.bool)
    both, one = load_policy(folder), load_policy(tmp_path / "one")
    assert torch.equal(both.logits(*ids), one.logits(*ids)) and both.fingerprint == one.fingerprint
    (folder / MODEL).unlink()
    shards = load_policy(folder)
    assert torch.equal(shards.logits(*ids), load_policy(write_dream(tmp_path / "two", seed=1)).logits(*ids))
    assert shards.fingerprint["weights"] != one.fingerprint["weights"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_plain_formats_are_cast(dtype, dream_dir, tmp_path):
    folder = Path(shutil.copytree(dream_dir, tmp_path / "m"))
    in_model(lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))(folder)
    weights, loaded = load_file(folder / MODEL), load_policy(folder).causal_lm.state_dict()
    assert all(torch.equal(loaded[name], w.float()) for name, w in weights.items())


def test_weights_are_not_read_before_they_fit(tmp_path):
    """A file of a terabyte that takes no room: its header alone is refused."""
    folder = write_dream(tmp_path / "m", num_hidden_layers=1)
    header, size = {}, 0
    for name, shape in (
        ("model.embed_tokens.weight", [4100, 32]),
        ("model.layers.0.mlp.up_proj.weight", [48, 5 * 10**9]),
    ):
        end = size + 4 * shape[0] * shape[1]
        header[name], size = {"dtype": "F32", "shape": shape, "data_offsets": [size, end]}, end
    text = json.dumps(header).encode()
    with (folder / MODEL).open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + size)
    refused(lambda: load_policy(folder), ["don't fit config.json"])


# -------------------------------------------------------------------------------------------------- reward models
# name, what is spoiled, words of the message
REWARDS: list[tuple[str, Spoil, list[str]]] = [
    ("ignored window", edit_json("config.json", attention_window=4), ["`attention_window` (4)", "ignored"]),
    ("ignored softcap", edit_json("config.json", final_logit_softcapping=30.0), ["`final_logit_softcapping` (30.0)"]),
    ("ignored scale", edit_json("config.json", embedding_multiplier=12.0), ["`embedding_multiplier` (12.0)"]),
    ("quantized", edit_json("config.json", quantization_config={"quant_method": "awq"}), ["quantized", "awq"]),
    ("other weights", edit_json("config.json", transformers_weights="x.safetensors"), ["`transformers_weights`"]),
    ("a million layers", edit_json("config.json", num_hidden_layers=10**6, layer_types=None), ["1000000", "layers"]),
    ("a layer less", edit_json("config.json", num_hidden_layers=1, layer_types=None), ["layers.1.", "does not have"]),
    ("a layer more", edit_json("config.json", num_hidden_layers=3, layer_types=None), ["lacks the weights"]),
    ("wide", edit_json("config.json", hidden_size=10**9), ["cannot be loaded"]),
    ("integers", in_model(remade("up_proj", lambda t: t.to(torch.int32))), ["up_proj.weight is stored as I32"]),
    ("fp8", in_model(remade("up_proj", lambda t: t.to(torch.float8_e5m2))), ["stored as F8_E5M2"]),
    ("NaN", in_model(remade("score", spoilt(float("nan")))), ["score.weight holds NaN"]),
    ("infinite", in_model(remade("embed", spoilt(float("inf")))), ["embed_tokens.weight holds infinite"]),
    ("a tensor more", in_model(lambda t: t.update({"score.bias": torch.ones(1)})), ["score.bias", "does not have"]),
    ("two labels in the head", in_model(remade("score", lambda t: t.repeat(2, 1))), ["score.weight", "(2, 32)"]),
    ("an adapter", lambda f: (f / "adapter_config.json").write_text("{}"), ["adapter_config.json"]),
    ("a pickle", lambda f: (f / MODEL).rename(f / "pytorch_model.bin"), ["no weights", "pickle"]),
]


@pytest.mark.parametrize(("spoil", "words"), [c[1:] for c in REWARDS], ids=[c[0] for c in REWARDS])
def test_a_reward_model_that_is_not_its_config_is_refused(spoil, words, reward_dir, tmp_path):
    folder = Path(shutil.copytree(reward_dir, tmp_path / "m"))
    spoil(folder)
    start = time.perf_counter()
    refused(lambda: load_classifier(folder), ["reward model" if "adapter" not in words[0] else str(folder), *words])
    assert time.perf_counter() - start < 10


def test_a_sharded_reward_model_leads_nowhere_else(reward_dir, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    folder = Path(shutil.copytree(reward_dir, tmp_path / "m"))
    (folder / MODEL).unlink()
    model.save_pretrained(folder, max_shard_size="300KB")
    prompts = Prompts(["this movie"], [{}])
    whole, sharded = load_classifier(reward_dir), load_classifier(folder)
    assert torch.equal(whole.score(prompts, [" good"]).reward_B, sharded.score(prompts, [" good"]).reward_B)
    shutil.copy(reward_dir / MODEL, folder / MODEL)  # now there are two sets, as transformers reads the first
    in_model(remade("score", lambda t: t * 2))(folder)
    two = load_classifier(folder)
    torch.testing.assert_close(two.score(prompts, [" good"]).reward_B, 2 * whole.score(prompts, [" good"]).reward_B)
    assert two.fingerprint["weights"] != sharded.fingerprint["weights"]
    (folder / MODEL).unlink()
    name = sorted(folder.glob("model-*.safetensors"))[0].name
    (folder / name).rename(tmp_path / name)
    in_index(lambda places: places.update({k: f"../{name}" for k, v in places.items() if v == name}))(folder)
    refused(lambda: load_classifier(folder), [INDEX, f"'../{name}'"])


def test_weights_of_another_head_and_fixed_buffers_are_passed_over(reward_dir, tmp_path):
    folder = Path(shutil.copytree(reward_dir, tmp_path / "m"))
    inert = {"lm_head.weight": torch.ones(4100, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    in_model(lambda t: t.update({**inert, "model.embeddings.position_ids": torch.arange(9)}))(folder)
    assert load_classifier(folder).fingerprint


# ------------------------------------------------------------------------------------------ code of a checkpoint
def with_code(folder):
    """Add code that a checkpoint brings along, which would leave a mark if it was run. Returns where."""
    mark = folder.parent / "ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass C: pass\nclass M: pass\nclass T: pass\n"
    (folder / "own.py").write_text(code)
    names = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForSequenceClassification": "own.M"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    auto = {"auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | auto))
    return mark


def test_code_that_a_checkpoint_brings_along_is_never_run(tmp_path):
    folder = write_reward(tmp_path / "r")
    mark = with_code(folder)
    with pytest.raises(ConfigError, match=r"`auto_map` in config.json.*never run"):
        load_classifier(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(ConfigError, match=r"no class of transformers', and code .* is never run"):
        load_classifier(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "auto_map"}))
    load_classifier(folder)
    policy = write_dream(tmp_path / "p")
    other = with_code(policy)
    load_policy(policy)
    assert not mark.exists() and not other.exists()
