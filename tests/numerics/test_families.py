"""Families: checkpoints in the authors' formats against a forward pass written out here in plain torch."""

import json

import pytest
import torch
from checkpoints import PROMPTS, write_dream, write_llada
from safetensors.torch import load_file, save_file

from rgrl.errors import ConfigError
from rgrl.models import load_policy
from rgrl.models.text import pad_left

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
    """The checkpoint on disk: its config, and its tensors under the authors' names."""
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(path))
    return json.loads((folder / "config.json").read_text()), weights


def stir(folder, seed=3):
    """Make norm scales and biases random too: at 1 and 0 a forward pass without them would look right."""
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
            shared = head // (heads // kv_heads)  # neighbouring heads share keys and values
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


def logits_of_row(policy, ids_L):
    return policy.logits(ids_L[None], torch.ones(1, len(ids_L), dtype=torch.bool))[0]


def assert_logits_of(policy, folder, length):
    """Those of a random row are the slow reference's from what lies on disk."""
    (raw, weights), ids_L = read_raw(folder), row(length)
    expected_LV = slow_logits(raw, weights, ids_L)[:, : policy.vocab_size]
    others = torch.arange(policy.vocab_size) != policy.mask_id
    torch.testing.assert_close(logits_of_row(policy, ids_L)[:, others], expected_LV[:, others], rtol=0, atol=5e-5)
    assert expected_LV.std() > 0.3  # large enough for the tolerance to mean something


@pytest.fixture(scope="module", params=WRITERS)
def stirred(request, tmp_path_factory):
    return load_policy(stir(WRITERS[request.param](tmp_path_factory.mktemp("stirred"))))


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
    assert_logits_of(load_policy(folder), folder, 9)


@pytest.mark.parametrize("stored", [False, True], ids=["head absent", "head stored"])
@pytest.mark.parametrize("name", WRITERS)
def test_tied_checkpoint_projects_with_its_embedding_table(name, stored, tmp_path):
    tie = {"dream": "tie_word_embeddings", "llada": "weight_tying"}[name]
    folder = stir(WRITERS[name](tmp_path / "m", **{tie: True}))
    _, weights = read_raw(folder)
    names = DREAM_NAMES if name == "dream" else LLADA_NAMES
    weights.pop(f"{names['head']}.weight", None)
    if stored:  # some tools write the tied matrix twice
        weights[f"{names['head']}.weight"] = weights[f"{names['table']}.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    assert_logits_of(load_policy(folder), folder, 6)


def test_left_padding_changes_no_rows_logits(stirred):
    rows = [row(3, 1), row(10, 2), row(1, 3), row(7, 4)]
    ids_BL, attention_BL = pad_left([ids.tolist() for ids in rows], "cpu", fill=4092)
    together_BLV = stirred.logits(ids_BL, attention_BL)
    for i, ids in enumerate(rows):
        torch.testing.assert_close(together_BLV[i, -len(ids) :], logits_of_row(stirred, ids), rtol=0, atol=1e-5)
    junk_BL = ids_BL.masked_fill(~attention_BL, 17)  # what the padding holds must not matter either
    torch.testing.assert_close(
        stirred.logits(junk_BL, attention_BL)[attention_BL], together_BLV[attention_BL], rtol=0, atol=1e-5
    )


def test_at_equals_the_full_logits_at_those_places(stirred):
    ids_BL, attention_BL = pad_left([row(8, 1).tolist(), row(5, 2).tolist()], "cpu")
    at_BL = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1, 0, 0]]).bool()  # both rows' first tokens too
    some_NV = stirred.logits(ids_BL, attention_BL, at_BL)
    assert some_NV.shape == (6, stirred.vocab_size) and some_NV.dtype == torch.float32
    torch.testing.assert_close(some_NV, stirred.logits(ids_BL, attention_BL)[at_BL], rtol=0, atol=1e-5)


def test_mask_token_and_undecodable_ids_can_never_be_written(policy):
    logits_LV = logits_of_row(policy, row(5))
    assert policy.causal_lm.get_input_embeddings().num_embeddings == 4100
    assert logits_LV.shape[-1] == policy.vocab_size == len(policy.tokenizer) == 4096
    assert policy.mask_id == 4093
    assert (logits_LV[..., 4093] == float("-inf")).all()
    assert logits_LV.isinf().sum() == 5  # and nothing else is ruled out


def test_unknown_model_type_is_refused_with_the_known_ones(tmp_path):
    folder = write_dream(tmp_path / "m", model_type="gpt2")
    with pytest.raises(ConfigError, match=r"gpt2.*Dream, llada"):
        load_policy(folder)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    folder = write_dream(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_policy(folder)


def test_dream_tokenizer_loads_without_its_authors_code(dream_dir):
    # The folder names a class of its own by auto_map and holds neither its code nor a tokenizer.json.
    assert sorted(p.name for p in dream_dir.glob("*") if "token" in p.name) == ["tokenizer_config.json"]
    assert not list(dream_dir.glob("*.py"))
    tokenizer = load_policy(dream_dir).tokenizer
    for text in [*PROMPTS, "  two  spaces\n\ttab", "naïve café — 日本 🙂", "2001: a space odyssey, isn't it?"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert max(ids) < 4092
        assert tokenizer.decode(ids) == text
    assert tokenizer("<|user|>this movie<|assistant|>")["input_ids"][::3] == [4094, 4095]
    assert len(tokenizer("this movie")["input_ids"]) == 2  # merges are used, not bytes


def test_decoding_stops_at_the_first_end_token(policy):
    one, two = (policy.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (" good", " bad"))
    assert len(one) == len(two) == 1
    end = policy.eos_id
    completion_BC = torch.tensor([one + two + one, [*one, end, *two], [end, end, *one], [*one, *two, end]])
    assert policy.decode(completion_BC) == [" good bad good", " good", "", " good bad"]


def test_end_of_turn_ends_a_completion_where_the_tokenizer_has_it(tmp_path):
    folder = write_dream(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|user|>", "<|im_end|>"))
    policy = load_policy(folder)
    assert policy.end_ids == (4092, 4094)
    good = policy.tokenizer(" good")["input_ids"][0]
    assert policy.decode(torch.tensor([[good, 4094, good]])) == [" good"]
    assert policy.is_end(torch.tensor([good, 4092, 4093, 4094])).tolist() == [False, True, False, True]


def test_prompts_are_padded_left_as_they_are_and_refused_when_too_long(dream_dir):
    policy, prompts = load_policy(dream_dir), ["this movie", "the plot of this film"]

    def encoded(texts):
        ids_BL, attention_BL = policy.encode(texts, 16)
        assert attention_BL.long().diff(dim=1).min() >= 0 and attention_BL[:, -1].all()
        return [policy.tokenizer.decode(ids[real]) for ids, real in zip(ids_BL, attention_BL, strict=True)]

    assert encoded(prompts) == prompts
    turns = [policy.format_prompt(text) for text in prompts]
    assert encoded(turns) == turns == [f"<|user|>{text}<|assistant|>" for text in prompts]
    with pytest.raises(ConfigError, match=r"max_prompt_length.*the plot of this film"):
        policy.encode(turns, 5)
