"""Every family, the one of docs/families.md among them: what must hold whatever a checkpoint looks like."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import REPO, TINY_DREAM, random_weights, save, save_fast_tokenizer, write_a2d, write_dream, write_llada
from safetensors.torch import load_file
from training import adapter, changed, go, untimed

from rgrl.config import ConfigError, GuidanceConfig, LoraConfig, ModelConfig, RolloutConfig
from rgrl.config.schema import FAMILIES as NAMES
from rgrl.export import export
from rgrl.models import add_lora, families, load_policy
from rgrl.models.names import layer_of
from rgrl.models.start import read_start, start_from
from rgrl.models.text import pad_left
from rgrl.plugins import resolve
from rgrl.rewards import load_classifier
from rgrl.rollout import generate
from rgrl.types import PrefixCache

PLUG_IN = "phi_family:FAMILY"
DOCUMENT = (REPO / "docs" / "families.md").read_text()


@pytest.fixture(scope="module", autouse=True)
def documented(tmp_path_factory):
    """phi_family.py of docs/families.md, importable."""
    folder = tmp_path_factory.mktemp("documented")
    code = next(block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.S) if "# phi_family.py" in block)
    (folder / "phi_family.py").write_text(code)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("phi_family", None)


def write_phi(folder, seed=0, **changes):
    """A tiny checkpoint as docs/families.md describes it."""
    config = {name: value for name, value in TINY_DREAM.items() if name not in ("architectures", "auto_map")}
    config |= {"model_type": "phi3_diffusion", **changes}
    weights = random_weights(resolve(PLUG_IN, "family"), config, seed)
    save({**config}, {theirs(name): w for name, w in weights.items()}, folder, shards=1)
    save_fast_tokenizer(folder)
    return folder


def theirs(name):
    return (
        name.replace("lm_head.", "output.")
        if name.startswith("lm_head.")
        else "backbone." + name.removeprefix("model.")
    )


WRITERS = {
    "dream": write_dream,
    "llada": write_llada,
    "a2d-qwen2": lambda folder, **changes: write_a2d(folder, "qwen2", **changes),
    "a2d-qwen3": lambda folder, **changes: write_a2d(folder, "qwen3", **changes),
    "a2d-llama": lambda folder, **changes: write_a2d(folder, "llama", **changes),
    PLUG_IN: write_phi,
}


@pytest.fixture(scope="module", params=WRITERS)
def checkpoint(request, tmp_path_factory):
    """The settings of a tiny checkpoint, one for each family."""
    name, folder = request.param, tmp_path_factory.mktemp("family")
    return ModelConfig(path=str(WRITERS[name](folder)), family=name if ":" in name else "auto")


@pytest.fixture(scope="module")
def policy(checkpoint):
    return load_policy(checkpoint)


def test_the_names_in_the_settings_are_those_of_the_families():
    assert {*NAMES} == {"auto"} | {family.name for family in families.FAMILIES.values()}
    assert {*families.FAMILIES, PLUG_IN} == {*WRITERS}, "a family without a checkpoint to test it on"


def tokens(*lengths, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 4090, (length,), generator=rng).tolist() for length in lengths]


def own_states(policy, ids):
    """Final states_LH of transformers' class itself, under a mask that is written out here: all see all."""
    L = len(ids)
    mask = torch.zeros(1, 1, L, L)
    with torch.no_grad():
        return policy.causal_lm.base_model(
            input_ids=torch.tensor([ids]), attention_mask=mask, position_ids=torch.arange(L)[None], use_cache=False
        ).last_hidden_state[0]


def test_position_l_scores_token_l(policy):
    (ids,) = tokens(9)
    scores_LV = policy.causal_lm.get_output_embeddings()(own_states(policy, ids))[:, : policy.vocab_size]
    if policy.family.shifted:  # the first token has no output before it, and takes its own
        scores_LV = torch.cat([scores_LV[:1], scores_LV[:-1]])
    found_LV = policy.logits(torch.tensor([ids]), torch.ones(1, 9, dtype=torch.bool))[0]
    others = torch.arange(policy.vocab_size) != policy.mask_id
    torch.testing.assert_close(found_LV[:, others], scores_LV[:, others], rtol=0, atol=2e-5)
    assert scores_LV.std() > 0.3 and bool(found_LV[:, policy.mask_id].isinf().all())
    assert policy.family.shifted == (policy.family.name in ("dream", "a2d"))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_padding_changes_nothing_in_any_kernel(checkpoint, policy, kernel):
    rows = tokens(3, 10, 1, 7)
    ids_BL, attention_BL = pad_left(rows, "cpu", fill=policy.eos_id)
    junk_BL = ids_BL.masked_fill(~attention_BL, 17)
    apart = [policy.logits(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))[0] for row in rows]
    other = load_policy(ModelConfig(path=checkpoint.path, family=checkpoint.family, attn_implementation=kernel))
    for canvas_BL in (ids_BL, junk_BL):
        together_BLV = other.logits(canvas_BL, attention_BL)
        for i, row in enumerate(rows):
            torch.testing.assert_close(together_BLV[i, -len(row) :], apart[i], rtol=0, atol=2e-5)
    # The cache of a prefix is an approximation, but not one of the kernel.
    later_BL = attention_BL & (torch.arange(10) >= 6)
    found = []
    for model in (policy, other):
        cache = PrefixCache(5)
        model.logits(ids_BL, attention_BL, prefix=cache)
        found.append(model.logits(junk_BL.where(later_BL, ids_BL), attention_BL, later_BL, prefix=cache))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)


def test_a_guided_rollout(policy, reward_dir):
    """Guided rows differ from unguided ones, and each row is what it is alone."""
    reward = load_classifier(reward_dir).bind(policy.tokenizer, policy.vocab_size)
    guidance = reward.guidance(GuidanceConfig(kind="entrgi", eta=50.0))
    settings, prompts = (
        RolloutConfig(max_completion_length=8, steps=4, num_generations=1),
        ["this movie", "the acting is"],
    )
    guided = generate(policy, prompts, settings, guidance=guidance).completion_BC
    plain = generate(policy, prompts, settings).completion_BC
    assert guided.shape == (2, 8) and bool((guided != policy.mask_id).all())
    assert bool((guided != plain).any(1).all())
    alone = generate(policy, prompts[:1], settings, guidance=guidance).completion_BC
    assert (alone[0] == guided[0]).all()


def test_the_page_itself(tmp_path, monkeypatch, capsys):
    """It is short, and what it runs on the family runs."""
    assert len(DOCUMENT.splitlines()) < 100
    code = next(block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.S) if "load_policy" in block)
    write_phi(tmp_path / "the" / "checkpoint")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.startswith("tensor([[")
    odd = write_phi(tmp_path / "odd", sliding_window=None, hidden_act="gelu")
    policy = load_policy(ModelConfig(path=str(odd), family=PLUG_IN))
    assert policy.causal_lm.config.hidden_act == "gelu"
    raw = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(raw | {"resid_pdrop": 0.1}))
    with pytest.raises(ConfigError, match=r"`resid_pdrop` \(0.1\) is not known to phi3_diffusion models"):
        load_policy(ModelConfig(path=str(odd), family=PLUG_IN))


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("phi_family:NOTHING", "model family 'phi_family:NOTHING' cannot be imported"),
        ("no_such_module:FAMILY", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "phi_family:make_config",
            "model family 'phi_family:make_config' is function, not a rgrl.models.families.Family",
        ),
    ],
)
def test_a_path_that_leads_to_no_family_is_one_line(family, told, dream_dir):
    with pytest.raises(ConfigError) as error:
        load_policy(ModelConfig(path=str(dream_dir), family=family))
    assert told in str(error.value) and "\n" not in str(error.value)


SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_training_resuming_and_exporting(checkpoint, tiny, tmp_path):
    """Two guided steps; gone on with after the first, by the settings that the run wrote, they end the same."""
    model = {"path": checkpoint.path, "family": checkpoint.family}
    config = changed(tiny, model=model, run={"eval_steps": 0}, optim={"learning_rate": 0.01}) | {"judge": {}}
    whole = go(config, tmp_path, output_dir="whole")
    assert [line["update/skipped"] for line in untimed(whole)] == [0, 0]
    first = whole / "checkpoints" / "step_000001"
    written = yaml.safe_load((whole / "config.yaml").read_text())
    parts = go(written, tmp_path, output_dir="parts", resume_from_checkpoint=str(first))
    assert adapter(whole, 1) != adapter(whole, 2) == adapter(parts, 2)
    # `auto` is written as the names that it stood for.
    names = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} if checkpoint.family == PLUG_IN else SEVEN
    assert names == {*written["lora"]["targets"]}
    exported_and_loaded_again(checkpoint, whole, written, tmp_path)


def exported_and_loaded_again(checkpoint, run, written, folder):
    """The adapter has the checkpoint's own names; it and the merged model give the same logits."""
    out, merged = (export(run, merge, "latest", folder / f"out_{merge}", None) for merge in (False, True))
    stored = {name for path in Path(checkpoint.path).glob("*.safetensors") for name in load_file(path)}
    layers = {layer_of(name) for name in load_file(out / "adapter_model.safetensors")}
    assert {f"{layer}.weight" for layer in layers} <= stored
    lora = LoraConfig(**written["lora"] | {"path": str(out)})
    adapted = add_lora(load_policy(checkpoint), lora, seed=1).eval()
    start_from(adapted, read_start(lora), lora)
    row, rows = tokens(9), []
    for policy in (load_policy(checkpoint), adapted, load_policy(replace(checkpoint, path=str(merged)))):
        with torch.no_grad():
            logits_BLV = policy.logits(*pad_left(row, "cpu", fill=0))
        rows.append(logits_BLV.masked_fill(logits_BLV.isinf(), 0.0))
    torch.testing.assert_close(rows[1], rows[2], rtol=0, atol=1e-5)
    assert (rows[1] - rows[0]).abs().max() > 1e-2
