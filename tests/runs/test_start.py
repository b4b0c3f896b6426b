"""`lora.path`: a run that starts from an adapter starts where that ended, and nothing of it is guessed."""

import json
import re
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from checkpoints import with_code, write_llada
from safetensors.torch import load_file, save_file
from training import assert_same_run, changed, go, resolved, tables, untimed
from transformers import AutoModel

from rgrl.checkpoint import check_start, load_adapter, other_base
from rgrl.errors import ConfigError
from rgrl.export import export
from rgrl.models import add_lora, load_policy
from rgrl.models.lora import adapter_parameters
from rgrl.models.start import read_start, start_from
from rgrl.trainer import evaluate


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_in) -> tuple[dict, Path]:
    """The settings and the output of a run of two steps on a LLaDA, whose layers have names of their own."""
    folder = tmp_path_factory.mktemp("first")
    base = write_llada(folder / "base")
    settings = changed(tiny_in(folder), model={"path": str(base)}, optim={"learning_rate": 0.01})
    return settings, go(settings, folder)


@pytest.fixture
def tiny(first) -> dict:
    return first[0]


@pytest.fixture
def ended(first, tmp_path) -> Path:
    """A copy of the adapter that the run ended with, which a test may spoil."""
    return shutil.copytree(first[1] / "checkpoints" / "step_000002" / "adapter", tmp_path / "adapter")


def started(tiny: dict, path: Path, **lora) -> dict[str, torch.Tensor]:
    """The parameters of an adapter that has started from `path`."""
    config = resolved(changed(tiny, lora={"path": str(path), **lora}), Path(tiny["model"]["path"]).parent)
    policy = add_lora(load_policy(config.model), config.lora, seed=9).eval()
    start_from(policy, read_start(config.lora), config.lora)
    return {name: p.detach() for name, p in adapter_parameters(policy).items()}


def expected(tiny: dict, checkpoint: Path) -> dict[str, torch.Tensor]:
    """What resuming from a checkpoint loads."""
    config = resolved(tiny, Path(tiny["model"]["path"]).parent)
    policy = add_lora(load_policy(config.model), config.lora, seed=3).eval()
    load_adapter(checkpoint, policy)
    return {name: p.detach() for name, p in adapter_parameters(policy).items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) == 28
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == torch.float32 for name in a)


def test_a_run_starts_where_the_adapter_ended_and_the_reference_stays_the_base(first, tiny, tmp_path, capfd):
    path = first[1] / "checkpoints" / "step_000002" / "adapter"
    settings = changed(tiny, lora={"path": str(path)})
    output = go(settings, tmp_path)
    err = capfd.readouterr().err
    assert f"starting from the adapter {path}\n" in err and "warning" not in err
    before, now = untimed(first[1]), untimed(output)
    assert [line["step"] for line in now] == [0, 1, 2]
    same = [key for key in now[0] if key.startswith("eval/")]
    assert {key: now[0][key] for key in same} == {key: before[-1][key] for key in same} and len(same) > 4
    rows = tables(first[1])["eval_000002.parquet"]
    assert tables(output)["eval_000000.parquet"] == rows != tables(first[1])["eval_000000.parquet"]
    assert now[1]["kl"] > 1e-4 > abs(before[1]["kl"]), "the reference is the base, not what the run began with"
    state = torch.load(output / "checkpoints" / "step_000001" / "state.pt")["optimizer"]
    assert state["step"].unique().tolist() == [1.0], "the optimizer starts anew"
    about = json.loads((output / "checkpoints" / "step_000002" / "about.json").read_text())
    assert about["start"]["path"] == str(path) and len(about["start"]["adapter"]) == 64
    card = (export(output, False, "latest", None, None) / "README.md").read_text()
    assert "| started from the adapter | `adapter` |" in card and str(tmp_path) not in card


def test_resumed_it_needs_the_adapter_no_more(tiny, ended, tmp_path):
    settings = changed(tiny, lora={"path": str(ended), "dropout": 0.1}, run={"eval_steps": 0})
    whole = go(settings, tmp_path, output_dir="whole", steps=2)
    broken = go(settings, tmp_path, output_dir="broken", steps=1)
    checkpoint, copy, other = broken / "checkpoints" / "step_000001", tmp_path / "copy", tmp_path / "other"
    for folder in (copy, other):
        shutil.copytree(ended, folder)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, other / "adapter_model.safetensors")
    for path in (other, tmp_path / "none"):
        with pytest.raises(ConfigError, match=r"`lora.path` was .*/adapter and is now .*; set it back, or to null$"):
            check_start(checkpoint, resolved(changed(settings, lora={"path": str(path)}), tmp_path))
    shutil.rmtree(ended)
    for path in (ended, copy, None):
        check_start(checkpoint, resolved(changed(settings, lora={"path": path and str(path)}), tmp_path))
    settings["lora"]["path"] = None
    go(settings, tmp_path, output_dir="broken", resume_from_checkpoint="latest", steps=2)
    assert_same_run(broken, whole, 2)
    about = json.loads((broken / "checkpoints" / "step_000002" / "about.json").read_text())
    assert about["start"]["path"] == str(ended)


def test_a_run_without_one_does_not_resume_with_one(first, tiny, ended, tmp_path):
    output = shutil.copytree(first[1], tmp_path / "run")
    settings = changed(tiny, lora={"path": str(ended)})
    with pytest.raises(
        ConfigError, match=r"`lora.path` was None and is now .*, but it is only read where a run begins"
    ):
        go(settings, tmp_path, steps=3, resume_from_checkpoint="latest")
    assert not (output / "checkpoints" / "step_000003").exists()


def test_an_adapter_is_evaluated_by_its_path(first, tiny, tmp_path, capfd):
    path = first[1] / "checkpoints" / "step_000002" / "adapter"
    found = evaluate(resolved(changed(tiny, lora={"path": str(path)}, run={"output_dir": str(tmp_path)}), tmp_path))
    assert found.metrics["eval/reward"] == untimed(first[1])[-1]["eval/reward"]
    assert f"\nadapter: {path}\n" in capfd.readouterr().err


def test_either_naming_and_any_float_format_start_the_same(first, tiny, ended, tmp_path):
    own = expected(tiny, first[1] / "checkpoints" / "step_000002")
    assert_equal(started(tiny, ended), own)
    assert_equal(started(tiny, export(first[1], False, "latest", tmp_path / "out", None)), own)
    # Saved by peft from transformers' own class, as a script for supervised fine-tuning does.
    config = resolved(tiny, tmp_path)
    policy = add_lora(load_policy(config.model), config.lora, seed=3)
    load_adapter(first[1] / "checkpoints" / "step_000002", policy)
    policy.peft_model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    names = set(load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert not names & set(load_file(ended / "adapter_model.safetensors"))
    assert_equal(started(tiny, tmp_path / "peft"), own)
    half = {name: tensor.bfloat16() for name, tensor in load_file(ended / "adapter_model.safetensors").items()}
    save_file(half, ended / "adapter_model.safetensors")
    assert_equal(started(tiny, ended), {name: tensor.bfloat16().float() for name, tensor in own.items()})


def test_an_adapter_that_was_trained_on_the_class_of_the_authors(tiny, tmp_path):
    base = with_code(shutil.copytree(tiny["model"]["path"], tmp_path / "base"), "llada")
    names = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(AutoModel.from_pretrained(base, trust_remote_code=True), config).eval()
    model.save_pretrained(tmp_path / "sft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    settings = resolved(changed(tiny, lora={"path": str(tmp_path / "sft"), "targets": targets}), tmp_path)
    policy = add_lora(load_policy(settings.model), settings.lora, seed=9).eval()
    start_from(policy, read_start(settings.lora), settings.lora)
    ids_BL = torch.randint(0, 4000, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = model(input_ids=ids_BL).logits, policy.logits(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool))
    torch.testing.assert_close(ours[..., :4093], theirs[..., :4093], rtol=0, atol=1e-6)


SETTINGS = [  # what adapter_config.json says, words of the message
    ({"r": 8}, "was trained with r 8: set `lora.r` to it, not 4"),
    ({"lora_alpha": 16}, "was trained with alpha 16: set `lora.alpha` to it, not 8"),
    ({"use_rslora": True}, "`use_rslora` is True"),
    ({"use_dora": True}, "`use_dora` is True"),
    ({"bias": "lora_only"}, "`bias` is 'lora_only'"),
    ({"lora_bias": True}, "`lora_bias` is True"),
    ({"fan_in_fan_out": True}, "`fan_in_fan_out` is True"),
    ({"rank_pattern": {"q_proj": 2}}, "`rank_pattern` is {'q_proj': 2}"),
    ({"alpha_pattern": {"q_proj": 2}}, "`alpha_pattern` is {'q_proj': 2}"),
    ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is ['lm_head']"),
    ({"target_parameters": ["q_proj.weight"]}, "`target_parameters` is ['q_proj.weight']"),
    ({"trainable_token_indices": [1]}, "`trainable_token_indices`"),
    ({"alora_invocation_tokens": [1]}, "`alora_invocation_tokens`"),
    ({"some_new_kind": 3}, "`some_new_kind`"),
    ({"peft_type": "LOHA"}, "`peft_type`"),
    ({"init_lora_weights": "pissa"}, "`init_lora_weights`"),
]


@pytest.mark.parametrize(("changes", "words"), SETTINGS, ids=[next(iter(changes)) for changes, _ in SETTINGS])
def test_what_would_be_another_function_is_refused_by_name(tiny, ended, changes, words):
    path = ended / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, on the way to ours
        with pytest.raises(ConfigError, match=f"`lora.path` .*{re.escape(words)}"):
            read_start(resolved(changed(tiny, lora={"path": str(ended)}), ended).lora)


def test_tensors_that_do_not_fit_are_refused(tiny, ended, tmp_path):
    path = ended / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.transformer.blocks.0.ff_out.lora_A.weight"
    layer = name.removesuffix(".lora_A.weight")
    other = "set `lora.targets` to [model.layers.0"
    spoiled = [
        ({key: t for key, t in tensors.items() if key != name}, "it lacks .*down_proj.lora_A.weight"),
        ({key: t for key, t in tensors.items() if not key.startswith(layer)}, f"it has none for .*{re.escape(other)}"),
        (
            {key: t for key, t in tensors.items() if "ff_" not in key},
            r"set `lora.targets` to \[k_proj, o_proj, q_proj,",
        ),
        (tensors | {name: tensors[name][:2].contiguous()}, "has shape"),
        (tensors | {name: tensors[name] * float("nan")}, "NaN"),
        (tensors | {name: tensors[name].to(torch.int8)}, "is stored as I8"),
        (tensors | {name.replace("blocks.0", "blocks.7"): tensors[name].clone()}, "has no place"),
        (tensors | {"base_model.model.model.transformer.wte.weight": tensors[name].clone()}, "has no place"),
    ]
    for content, words in spoiled:
        save_file(content, path)
        with pytest.raises(ConfigError, match=f"`lora.path` .*{words}"):
            started(tiny, ended)
    path.unlink()
    torch.save(tensors, ended / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin, a pickle"):
        started(tiny, ended)
    (tmp_path / "checkpoint").mkdir()
    inside = ended.rename(tmp_path / "checkpoint" / "adapter")
    with pytest.raises(ConfigError, match=f"is a checkpoint; its adapter is {inside}"):
        started(tiny, inside.parent)
    with pytest.raises(ConfigError, match=r"no adapter_config\.json there"):
        started(tiny, tmp_path)


def test_an_adapter_of_another_base_is_told(first, tiny, ended, tmp_path):
    """It would fit: only the content of a checkpoint, or the name that peft notes, tells."""
    own, other = load_policy(tiny["model"]["path"]), load_policy(write_llada(tmp_path / "another", seed=5))
    inside = first[1] / "checkpoints" / "step_000002" / "adapter"
    for path, told in ((inside, "its weights differ"), (ended, f"it names {own.path}")):
        config = resolved(changed(tiny, lora={"path": str(path)}), tmp_path).lora
        assert other_base(config, own) is None
        expected = f"`lora.path` {path} was trained on another model than `model.path` {other.path} ({told})"
        assert other_base(config, other) == expected
