"""Families: checkpoints in the authors' formats against a forward pass written out here in plain torch."""

import json

import pytest
import torch
from conftest import PROMPTS, write_dream, write_llada
from safetensors.torch import load_file, save_file

from rgrl.config import ConfigError, ModelConfig
from rgrl.models import load_policy

WRITERS = {"dream": write_dream, "llada": write_llada}
# What the reference calls each tensor, and what the authors call it.
DREAM_NAMES = {
    "table": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "block": "model.layers.{}.",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LLADA_NAMES = {
    "table": "model.transformer.wte",
    "head": "model.transformer.ff_out",
    "norm": "model.transformer.ln_f",
    "block": "model.transformer.blocks.{}.",
    "norm1": "attn_norm",
    "norm2": "ff_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}


def read_raw(folder):
    """The checkpoint as it lies on disk: its config and its tensors under the authors' names."""
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(path))
    return json.loads((folder / "config.json").read_text()), weights


def stir(folder, seed=3):
    """Make norm scales and biases random too: at 1 and 0 a forward pass that forgot them would look right."""
    rng = torch.Generator().manual_seed(seed)
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        for name, w in sorted(weights.items()):
            if w.ndim == 1:
                weights[name] = w + 0.3 * torch.randn(w.shape, generator=rng)
        save_file(weights, path)
    return folder


def rms_norm(x_LH, scale_H, eps):
    return x_LH / (x_LH.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale_H


def rotate(x_Ld, theta):
    """Rotary embedding of one head: dimension i is paired with i + d/2."""
    L, d = x_Ld.shape
    out = torch.empty_like(x_Ld)
    for position in range(L):
        for i in range(d // 2):
            angle = torch.tensor(position * theta ** (-2 * i / d), dtype=x_Ld.dtype)
            a, b = x_Ld[position, i], x_Ld[position, i + d // 2]
            out[position, i] = a * angle.cos() - b * angle.sin()
            out[position, i + d // 2] = b * angle.cos() + a * angle.sin()
    return out


def slow_logits(raw, weights, ids_L):
    """logits_LV of one unpadded row, every row of the table included, by the papers' formulas."""
    dream = raw["model_type"] == "Dream"
    names = DREAM_NAMES if dream else LLADA_NAMES
    heads = raw["num_attention_heads" if dream else "n_heads"]
    kv_heads = raw["num_key_value_heads" if dream else "n_kv_heads"]
    layers = raw["num_hidden_layers" if dream else "n_layers"]
    eps, theta = raw["rms_norm_eps"], raw["rope_theta"]
    tied = raw["tie_word_embeddings" if dream else "weight_tying"]

    def get(part, block=None, kind="weight"):
        prefix = "" if block is None else names["block"].format(block)
        return weights[f"{prefix}{names[part]}.{kind}"].float()

    def project(x_LH, part, block):
        y = x_LH @ get(part, block).T
        return y + get(part, block, "bias") if dream and part in "qkv" else y

    x_LH = get("table")[ids_L]
    d = x_LH.shape[1] // heads
    for n in range(layers):
        h_LH = rms_norm(x_LH, get("norm1", n), eps)
        q, k, v = (project(h_LH, part, n) for part in "qkv")
        mixed = []
        for head in range(heads):
            shared = head // (heads // kv_heads)  # heads that stand together share keys and values
            q_Ld = rotate(q[:, head * d : (head + 1) * d], theta)
            k_Ld = rotate(k[:, shared * d : (shared + 1) * d], theta)
            v_Ld = v[:, shared * d : (shared + 1) * d]
            mixed.append((q_Ld @ k_Ld.T / d**0.5).softmax(-1) @ v_Ld)  # no causal mask: every token sees every other
        x_LH = x_LH + project(torch.cat(mixed, 1), "o", n)
        h_LH = rms_norm(x_LH, get("norm2", n), eps)
        gate = project(h_LH, "gate", n)
        x_LH = x_LH + project(gate / (1 + (-gate).exp()) * project(h_LH, "up", n), "down", n)
    logits_LV = rms_norm(x_LH, get("norm"), eps) @ (get("table") if tied else get("head")).T
    if dream:  # the state before a token scores it; the first token has only its own
        logits_LV = torch.stack([logits_LV[max(i - 1, 0)] for i in range(len(ids_L))])
    return logits_LV


def row(length, seed=0):
    return torch.randint(0, 4092, (length,), generator=torch.Generator().manual_seed(seed))


def padded(rows):
    width = max(map(len, rows))
    ids_BL, attention_BL = torch.full((len(rows), width), 4092), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, ids in enumerate(rows):
        ids_BL[i, width - len(ids) :], attention_BL[i, width - len(ids) :] = ids, True
    return ids_BL, attention_BL


def load(folder):
    return load_policy(ModelConfig(path=str(folder)))


CASES = {
    "dream": ("dream", 1, {}),
    "dream sharded": ("dream", 3, {}),
    "dream other rope and norm": ("dream", 1, {"rope_theta": 500.0, "rms_norm_eps": 0.1}),
    "llada": ("llada", 1, {}),
    "llada sharded": ("llada", 3, {}),
    "llada grouped heads": ("llada", 1, {"n_kv_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_a_slow_reference_on_the_raw_tensors(case, tmp_path):
    name, shards, changes = CASES[case]
    folder = stir(WRITERS[name](tmp_path / "m", shards=shards, **changes))
    assert len(list(folder.glob("*.safetensors"))) == shards
    policy, (raw, weights) = load(folder), read_raw(folder)
    ids_L = row(9)
    logits_LV = policy.logits(ids_L[None], torch.ones(1, 9, dtype=torch.bool))[0]
    expected_LV = slow_logits(raw, weights, ids_L)[:, : policy.vocab_size]
    assert expected_LV.std() > 0.3  # large enough for the tolerance to mean something
    others = torch.arange(policy.vocab_size) != policy.mask_id
    torch.testing.assert_close(logits_LV[:, others], expected_LV[:, others], rtol=0, atol=5e-5)


@pytest.mark.parametrize("stored", [False, True], ids=["head absent", "head stored"])
@pytest.mark.parametrize("name", WRITERS)
def test_tied_checkpoint_projects_with_its_embedding_table(name, stored, tmp_path):
    tie = {"dream": "tie_word_embeddings", "llada": "weight_tying"}[name]
    folder = stir(WRITERS[name](tmp_path / "m", **{tie: True}))
    raw, weights = read_raw(folder)
    names = DREAM_NAMES if name == "dream" else LLADA_NAMES
    weights.pop(f"{names['head']}.weight", None)
    if stored:  # some tools write the tied matrix twice
        weights[f"{names['head']}.weight"] = weights[f"{names['table']}.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    policy, ids_L = load(folder), row(6)
    logits_LV = policy.logits(ids_L[None], torch.ones(1, 6, dtype=torch.bool))[0]
    expected_LV = slow_logits(raw, weights, ids_L)[:, : policy.vocab_size]
    others = torch.arange(policy.vocab_size) != policy.mask_id
    torch.testing.assert_close(logits_LV[:, others], expected_LV[:, others], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_left_padding_changes_no_rows_logits(name, tmp_path):
    policy = load(stir(WRITERS[name](tmp_path / "m")))
    rows = [row(3, 1), row(10, 2), row(1, 3), row(7, 4)]
    ids_BL, attention_BL = padded(rows)
    together_BLV = policy.logits(ids_BL, attention_BL)
    for i, ids in enumerate(rows):
        alone_LV = policy.logits(ids[None], torch.ones(1, len(ids), dtype=torch.bool))[0]
        torch.testing.assert_close(together_BLV[i, -len(ids) :], alone_LV, rtol=0, atol=1e-5)
        junk_BL = ids_BL.clone()  # what the padding holds must not matter either
        junk_BL[~attention_BL] = 17
    torch.testing.assert_close(
        policy.logits(junk_BL, attention_BL)[attention_BL], together_BLV[attention_BL], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", WRITERS)
def test_at_equals_the_full_logits_at_those_places(name, tmp_path):
    policy = load(stir(WRITERS[name](tmp_path / "m")))
    ids_BL, attention_BL = padded([row(8, 1), row(5, 2)])
    at_BL = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1, 0, 0]]).bool()  # both rows' first tokens too
    some_NV = policy.logits(ids_BL, attention_BL, at_BL)
    assert some_NV.shape == (6, policy.vocab_size) and some_NV.dtype == torch.float32
    torch.testing.assert_close(some_NV, policy.logits(ids_BL, attention_BL)[at_BL], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_mask_token_and_undecodable_ids_can_never_be_written(name, request):
    policy = load(request.getfixturevalue(f"{name}_dir"))
    logits_BLV = policy.logits(row(5)[None], torch.ones(1, 5, dtype=torch.bool))
    assert policy.causal_lm.get_input_embeddings().num_embeddings == 4100
    assert logits_BLV.shape[-1] == policy.vocab_size == len(policy.tokenizer) == 4096
    assert policy.mask_id == 4093
    assert (logits_BLV[..., 4093] == float("-inf")).all()
    assert logits_BLV.isinf().sum() == 5  # and nothing else is ruled out


def test_unknown_model_type_is_refused_with_the_known_ones(tmp_path):
    folder = write_dream(tmp_path / "m", model_type="gpt2")
    with pytest.raises(ConfigError, match=r"gpt2.*Dream, llada"):
        load(folder)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    folder = write_dream(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_dream_tokenizer_loads_without_its_authors_code(dream_dir):
    # The folder names a class of its own by auto_map and holds neither its code nor a tokenizer.json.
    assert sorted(p.name for p in dream_dir.glob("*") if "token" in p.name) == ["tokenizer_config.json"]
    assert not list(dream_dir.glob("*.py"))
    tokenizer = load(dream_dir).tokenizer
    for text in [*PROMPTS, "  two  spaces\n\ttab", "naïve café — 日本 🙂", "2001: a space odyssey, isn't it?"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert max(ids) < 4092
        assert tokenizer.decode(ids) == text
    assert tokenizer("<|user|>this movie<|assistant|>")["input_ids"][::3] == [4094, 4095]
    assert len(tokenizer("this movie")["input_ids"]) == 2  # merges are used, not bytes


@pytest.mark.parametrize("name", WRITERS)
def test_decoding_stops_at_the_first_end_token(name, request):
    policy = load(request.getfixturevalue(f"{name}_dir"))
    one, two = (policy.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (" good", " bad"))
    assert len(one) == len(two) == 1
    end = policy.eos_id
    completion_BC = torch.tensor([one + two + one, [*one, end, *two], [end, end, *one], [*one, *two, end]])
    assert policy.decode(completion_BC) == [" good bad good", " good", "", " good bad"]


def test_end_of_turn_ends_a_completion_where_the_tokenizer_has_it(tmp_path):
    folder = write_dream(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|user|>", "<|im_end|>"))
    policy = load(folder)
    assert policy.end_ids == (4092, 4094)
    good = policy.tokenizer(" good")["input_ids"][0]
    assert policy.decode(torch.tensor([[good, 4094, good]])) == [" good"]
    assert policy.is_end(torch.tensor([good, 4092, 4093, 4094])).tolist() == [False, True, False, True]


def test_prompts_are_padded_left_with_the_chat_format_and_refused_when_too_long(dream_dir):
    policy = load(dream_dir)
    prompt_BL, attention_BL = policy.encode_prompts(["this movie", "the plot of this film"], 16)
    assert attention_BL.long().diff(dim=1).min() >= 0 and attention_BL[:, -1].all()
    texts = [policy.tokenizer.decode(ids[real]) for ids, real in zip(prompt_BL, attention_BL, strict=True)]
    assert texts == ["<|user|>this movie<|assistant|>", "<|user|>the plot of this film<|assistant|>"]
    with pytest.raises(ConfigError, match="max_prompt_length"):
        policy.encode_prompts(["this movie", "the plot of this film"], 5)
