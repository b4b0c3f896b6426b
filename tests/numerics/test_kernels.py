"""Attention kernels and number formats: the same model, or one line that says what is missing."""

import importlib.util
import json
import math
import sys
import types

import pytest
import torch
from checkpoints import write_a2d, write_dream, write_llada
from training import changed, go, resolved, untimed
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from rgrl.config import ConfigError, LoraConfig, ModelConfig
from rgrl.models import add_lora, load_policy
from rgrl.models.attention import attend_both_ways, check_attention, check_kernel, mask_for
from rgrl.models.lora import adapter_parameters, check_gradients
from rgrl.models.quantize import check_quantized, full_size
from rgrl.runtime.launch import shard_size
from rgrl.setup import check_sharing

ABSENT = importlib.util.find_spec("bitsandbytes") is None
WRITERS = {"dream": write_dream, "llada": write_llada, "a2d": write_a2d}


def model(kind="eager", causal=False):
    """A small decoder with visible differences between inputs."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=100, hidden_size=32, intermediate_size=48, attn_implementation=kind, **sizes)
    config.is_causal = causal
    made = Qwen2ForCausalLM(config).eval()
    for p in made.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return made


# ------------------------------------------------------------------------------------------------ attention
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRITERS)
def test_eager_is_sdpa_up_to_rounding(name, dtype, tmp_path):
    path = str(WRITERS[name](tmp_path / "m"))
    ids_BL = torch.randint(0, 4000, (3, 9), generator=torch.Generator().manual_seed(1))
    attention_BL = torch.arange(9) >= torch.tensor([0, 2, 8])[:, None]
    found = []
    for kernel in ("sdpa", "eager"):
        policy = load_policy(ModelConfig(path=path, dtype=dtype, attn_implementation=kernel))
        assert policy.causal_lm.config._attn_implementation == kernel
        found.append(policy.states(ids_BL, attention_BL)[attention_BL].float())
    close = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    assert (found[0] - found[1]).abs().max() < close * found[0].abs().max()


def test_a_bool_mask_in_eager_is_what_the_check_is_for(monkeypatch):
    """transformers adds it to the scores as 1 and 0, without a word."""
    check_attention(model())
    monkeypatch.setattr("rgrl.models.attention.mask_for", lambda kernel, *given: mask_for("sdpa", *given))
    with pytest.raises(ConfigError, match=r"Qwen2ForCausalLM \(.*eager`\) does not leave padding out"):
        check_attention(model())


def test_a_causal_kernel_and_a_class_with_masks_of_its_own_are_refused(monkeypatch):
    def causal(kernel, attention_BL, queries, dtype):
        L = attention_BL.shape[1]
        return mask_for("sdpa", attention_BL, queries, dtype) & torch.ones(L, L, dtype=torch.bool).tril()

    check_attention(model("sdpa"))
    with monkeypatch.context() as patch:
        patch.setattr("rgrl.models.attention.mask_for", causal)
        with pytest.raises(ConfigError, match="does not attend both ways: the first token does not see the last one"):
            check_attention(model("sdpa"))
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel .* does not take token ids, a mask, positions and a cache"):
        check_attention(GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=4)).eval())


def test_flash_attention_is_refused_where_it_cannot_run(dream_dir, monkeypatch):
    for kernel, package in (("flash_attention_2", "flash-attn"), ("flash_attention_3", "flash-attn-3")):
        with pytest.raises(ConfigError, match=f"`model.attn_implementation: {kernel}` needs the package {package}, "):
            load_policy(ModelConfig(path=str(dream_dir), attn_implementation=kernel))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if it were installed
    with pytest.raises(ConfigError, match="needs a GPU, and this runs on cpu"):
        check_kernel("flash_attention_2", "bfloat16", "cpu")
    with pytest.raises(ConfigError, match=r"needs `model.dtype: bfloat16`, not float32"):
        check_kernel("flash_attention_2", "float32", "cuda")
    check_kernel("flash_attention_2", "bfloat16", "cuda:1")


def flash_attention(q_BLHd, k_BLHd, v_BLHd, softmax_scale, causal=False, window_size=(-1, -1), **more):
    """What the package computes, in plain torch."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHd, k_BLHd, v_BLHd))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * softmax_scale
    if causal:
        Q, K = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(Q, K, dtype=torch.bool).tril(K - Q), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def flash_attention_of_rows(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=False
):
    """The same of rows that stand one behind another, without padding."""
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    rows = zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True)
    return torch.cat(
        [flash_attention(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale, causal)[0] for a, b, c, d in rows]
    )


def test_flash_attention_gets_masks_that_it_honours(monkeypatch):
    """Through transformers' own code up to the package, which is written out here as it cannot run on a CPU."""
    functions = {
        "flash_attn_func": flash_attention,
        "flash_attn_varlen_func": flash_attention_of_rows,
        "flash_attn_with_kvcache": flash_attention,
    }
    package = types.ModuleType("flash_attn_interface")
    vars(package).update(functions)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    flash = model()
    # Past transformers' look at the machine.
    monkeypatch.setattr(
        flash, "set_attn_implementation", lambda name: setattr(flash.config, "_attn_implementation_internal", name)
    )
    flash.set_attn_implementation("flash_attention_3")
    attend_both_ways(flash)
    check_attention(flash)
    assert flash.config._attn_implementation == "flash_attention_3"
    # Causal in each layer, as it is where nobody says otherwise.
    monkeypatch.setattr("test_kernels.flash_attention", lambda *args, **more: real(*args[:4], causal=True))
    with pytest.raises(ConfigError, match="does not attend both ways"):
        check_attention(flash)


real = flash_attention


# ------------------------------------------------------------------------------------------------ number formats
def test_a_bfloat16_policy_trains_a_step(tiny, tmp_path):
    """Guided, with gradient checkpointing; the adapter is float32, and moves."""
    config = changed(tiny, model={"dtype": "bfloat16"}, run={"gradient_checkpointing": True, "eval_steps": 0})
    run = go(config, tmp_path, steps=1)
    (line,) = untimed(run)
    assert line["update/skipped"] == 0 and 0 < line["grad_norm"] < math.inf
    policy = load_policy(ModelConfig(path=tiny["model"]["path"], dtype="bfloat16"))
    assert policy.causal_lm.dtype == torch.bfloat16
    assert {p.dtype for p in adapter_parameters(add_lora(policy, LoraConfig(r=2), 0)).values()} == {torch.float32}


@pytest.mark.skipif(not ABSENT, reason="bitsandbytes is installed")
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantizing_without_bitsandbytes_is_one_line(quantize, tiny, tmp_path):
    with pytest.raises(ConfigError, match=rf"`model.quantize: {quantize}` needs bitsandbytes, .*\[quantize\]"):
        go(changed(tiny, model={"quantize": quantize}), tmp_path)
    assert not (tmp_path / "run").exists()


def test_what_processes_cannot_share_is_refused_before_it_is_loaded():
    for settings in ({"quantize": "nf4"}, {"attn_implementation": "flash_attention_2"}):
        (name,) = settings
        with pytest.raises(ConfigError, match=rf"`model.{name}: \w+` does not work where processes share .*ddp.yaml"):
            check_sharing(ModelConfig(**settings), 2)
        check_sharing(ModelConfig(**settings), 1)
    check_sharing(ModelConfig(attn_implementation="eager"), 2)
    assert shard_size({}, 2) == 1


def test_a_decoder_that_stayed_whole_is_noticed():
    with pytest.raises(ConfigError, match=r"`model.quantize: nf4` cannot load .*q_proj is not quantized"):
        check_quantized(model(), "nf4")


@pytest.mark.skipif(ABSENT, reason="needs bitsandbytes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_decoder(quantize, dtype, dream_dir):
    """Close to the whole one, with head and embedding as they are, and rows that don't depend on their batch."""
    whole = load_policy(ModelConfig(path=str(dream_dir), dtype=dtype))
    policy = load_policy(ModelConfig(path=str(dream_dir), dtype=dtype, quantize=quantize))
    assert torch.equal(policy.causal_lm.lm_head.weight, whole.causal_lm.lm_head.weight)
    assert sum(map(full_size, policy.parameters())) == sum(p.numel() for p in whole.parameters())
    ids_BL = torch.randint(0, 4000, (4, 9), generator=torch.Generator().manual_seed(1))
    attention_BL = torch.arange(9) >= torch.tensor([0, 2, 8, 5])[:, None]
    one, other = whole.states(ids_BL, attention_BL).float(), policy.states(ids_BL, attention_BL).float()
    gap = float((one - other)[attention_BL].abs().mean() / one[attention_BL].abs().mean())
    print(f"\n{quantize} {dtype}: states differ by {gap:.3f} of their size")
    assert 0 < gap < {"nf4": 0.5, "int8": 0.05}[quantize]
    alone = torch.cat([policy.states(ids_BL[i : i + 1], attention_BL[i : i + 1]) for i in range(4)]).float()
    assert torch.equal(alone[attention_BL], other[attention_BL])
    add_lora(policy, LoraConfig(r=2, dropout=0.1), 0)
    assert {p.dtype for p in adapter_parameters(policy).values()} == {torch.float32}
    with policy.reference():
        assert torch.equal(policy.states(ids_BL, attention_BL).float(), other)
    check_gradients(policy.eval())


@pytest.mark.skipif(ABSENT, reason="needs bitsandbytes")
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_policy_trains_and_resumes(quantize, tiny, tmp_path):
    model = {"quantize": quantize, "dtype": "bfloat16"}
    config = changed(tiny, model=model, run={"gradient_checkpointing": True, "eval_steps": 0})
    run = go(config, tmp_path, steps=2)
    assert [line["update/skipped"] for line in untimed(run)] == [0, 0]
    base = json.loads((run / "checkpoints" / "step_000002" / "adapter" / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == tiny["model"]["path"]
    whole = changed(config, model={"quantize": "none"}, run={"steps": 3, "resume_from_checkpoint": "latest"})
    with pytest.raises(ConfigError, match=f"`model.quantize` was {quantize} and is now none"):
        go(whole, tmp_path)
    go(config, tmp_path, steps=3, resume_from_checkpoint="latest")
    assert resolved(config, tmp_path).model.quantize == quantize
