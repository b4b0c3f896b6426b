"""A2D checkpoints against transformers' own loading of the same file, and what the settings say for them."""

import json
import shutil

import pytest
import torch
from checkpoints import write_a2d
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rgrl.config import ConfigError, ModelConfig
from rgrl.models import load_policy

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "sharded": {"tie_word_embeddings": False, "shards": 3},
    "base": {"rope_theta": 500.0},
    "base as transformers 5 spells it": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7},
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}, "rope_theta": None},
    "as many keys as heads": {"num_key_value_heads": None},
    "one head of keys": {"num_key_value_heads": 1, "rms_norm_eps": 0.1},
    "gelu": {"hidden_act": "gelu"},
}


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def stirred(folder):
    """With norms and biases that are not 1 and 0."""
    rng = torch.Generator().manual_seed(3)
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        moved = {k: w + 0.3 * torch.randn(w.shape, generator=rng) for k, w in sorted(weights.items()) if w.ndim == 1}
        save_file(weights | moved, path, {"format": "pt"})
    return folder


def transformers_logits(folder, kind, ids_L):
    """logits_LV of transformers' autoregressive class, loaded by transformers, where every token sees every other."""
    plain = shutil.copytree(folder, folder.with_name("plain"))
    raw = {k: v for k, v in json.loads((plain / "config.json").read_text()).items() if (k, v) != ("rope_theta", None)}
    (plain / "config.json").write_text(json.dumps(raw | {"model_type": kind}))
    model = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager", dtype=torch.float32).eval()
    L = len(ids_L)
    mask = torch.zeros(1, 1, L, L)  # added to the scores: nothing is hidden
    with torch.no_grad():
        return model(input_ids=ids_L[None], attention_mask=mask).logits[0]


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(("qwen3", case) for case in CASES),
        *((kind, case) for kind in ("qwen2", "llama") for case in [*CASES][:2]),
        ("llama", "llama3"),
    ],
)
def test_logits_are_those_of_transformers_own_class(kind, case, tmp_path):
    folder = stirred(write_a2d(tmp_path / "m", kind, **CASES[case]))
    ids_L = torch.randint(0, 4090, (40,), generator=torch.Generator().manual_seed(0))
    expected_LV = transformers_logits(folder, kind, ids_L)
    shifted_LV = torch.cat([expected_LV[:1], expected_LV[:-1]])
    for shifted, wanted_LV in ((None, shifted_LV), (False, expected_LV)) if case == "tied" else ((None, shifted_LV),):
        policy = load_policy(ModelConfig(path=str(folder), shifted=shifted))
        found_LV = policy.logits(ids_L[None], torch.ones(1, 40, dtype=torch.bool))[0]
        others = torch.arange(policy.vocab_size) != policy.mask_id
        wanted_LV = wanted_LV[:, : policy.vocab_size]
        torch.testing.assert_close(found_LV[:, others], wanted_LV[:, others], rtol=0, atol=5e-5)
    assert expected_LV.std() > 0.3


def test_a_plain_autoregressive_type_wants_to_be_called_diffusion(tmp_path):
    folder = write_a2d(tmp_path / "m", "qwen3", model_type="qwen3")
    with pytest.raises(ConfigError, match=r"'qwen3' .* autoregressive .* `model.family: a2d`"):
        load_policy(folder)
    assert load_policy(ModelConfig(path=str(folder), family="a2d")).family.model_type == "a2d-qwen3"
    with pytest.raises(ConfigError, match=r"'gpt2' .* a2d-qwen2, a2d-qwen3, a2d-llama, qwen2, qwen3, llama"):
        load_policy(ModelConfig(path=str(edit(folder, model_type="gpt2")), family="a2d"))


def test_the_mask_from_config_tokenizer_or_settings(tmp_path):
    folder = write_a2d(tmp_path / "m", "llama")
    assert load_policy(folder).mask_id == 4093
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("mask_token_id")
    (folder / "config.json").write_text(json.dumps(raw))
    assert load_policy(folder).mask_id == 4093  # the tokenizer's
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"mask_token"', '"no_mask"'))
    with pytest.raises(ConfigError, match=r"names a mask token; set `model.mask_token`"):
        load_policy(folder)
    policy = load_policy(ModelConfig(path=str(folder), mask_token="<|user|>", end_token="<|assistant|>"))
    assert (policy.mask_id, policy.end_ids) == (4094, (4092, 4095))
    assert policy.format_prompt("<|user|>").count("<|user|>") == 1, "a mask in a prompt is text"
    for settings, told in (
        ({"mask_token": "the"}, "`model.mask_token`: 'the' is not a special token"),
        (
            {"mask_token": "<|nothing|>"},
            "'<|nothing|>' is not a special token of the tokenizer; there are <|endoftext|>",
        ),
        ({"mask_token": "<|endoftext|>"}, "is also the end token"),
        ({"mask_token": "<|user|>", "end_token": "<|user|>"}, "'<|user|>' ends an answer, so it cannot hide a place"),
        ({"mask_token": "<|mask|>", "end_token": "the"}, "`model.end_token`: 'the' is not a special token"),
    ):
        with pytest.raises(ConfigError) as error:
            load_policy(ModelConfig(path=str(folder), **settings))
        assert told in str(error.value)


def test_several_end_tokens_of_config_json(tmp_path):
    folder = write_a2d(tmp_path / "m", "llama", eos_token_id=[4092, 4095])
    assert load_policy(folder).end_ids == (4092, 4095)
    policy = load_policy(write_a2d(tmp_path / "none", "llama", eos_token_id=None, bos_token_id=None))
    assert policy.end_ids == (4092,), "not the token 2, which is LlamaConfig's default"


def test_a_mask_that_was_added_beyond_the_table_is_refused(tmp_path):
    """As an autoregressive checkpoint has it whose embedding was never made larger."""
    folder = write_a2d(tmp_path / "m", "qwen3", vocab_size=4093, pad_token_id=None)
    with pytest.raises(ConfigError, match="the mask token 4093 is beyond the model's 4093 embeddings"):
        load_policy(folder)


REFUSED = {
    "a window": ({"use_sliding_window": True, "sliding_window": 8}, "`use_sliding_window` is true"),
    "layers that see a window": ({"layer_types": ["full_attention", "sliding_attention"]}, "`layer_types`"),
    "a scale by the batch": ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "`rope_scaling` is of kind"),
    "a scale by the length": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "`rope_scaling` is of kind"),
    "another architecture's field": ({"loophole_enabled": True}, "`loophole_enabled` (true) is not known"),
    "a bias that is text": ({"attention_bias": "no"}, "`attention_bias`"),
    "padding beyond the table": ({"vocab_size": 4000}, "describes no model that can be built: Padding_idx"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case, tmp_path):
    changes, told = REFUSED[case]
    folder = edit(write_a2d(tmp_path / "m", "qwen3"), **changes)
    with pytest.raises(ConfigError) as error:
        load_policy(folder)
    assert told in str(error.value) and "\n" not in str(error.value)
