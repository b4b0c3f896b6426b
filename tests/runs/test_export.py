"""What a run leaves, others can load: the adapter on the class of the base's authors, or merged into its files."""

import ast
import json
import re
import resource
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from checkpoints import REPO, llada_name, with_code, write_dream, write_llada
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training import adapter, changed, go, resealed, resolved
from transformers import AutoModel

from rgrl.checkpoint import load_adapter
from rgrl.checkpoint.format import adapter_of
from rgrl.cli import main
from rgrl.errors import ConfigError
from rgrl.export import export
from rgrl.models import add_lora, load_policy
from rgrl.models.merge import plan, write_merged
from rgrl.models.names import factor_name, layer_of, settings_of, to_original
from rgrl.tracking.card import public_name

# Three layers: with 20 names and more, peft looks for shorter ones that mean the same.
BASES = {
    "dream": lambda folder: write_dream(folder, shards=2, num_hidden_layers=3),
    "llada": lambda folder: write_llada(folder, shards=2, n_layers=3, n_kv_heads=2),
}
IDS_BL = torch.randint(0, 4000, (3, 12), generator=torch.Generator().manual_seed(0))


@dataclass
class Trained:
    name: str
    base: Path
    settings: dict
    output: Path

    def adapter(self, step: int = 2) -> Path:
        return self.output / "checkpoints" / f"step_{step:06d}" / "adapter"

    def logits(self, at: Path | None = None) -> torch.Tensor:
        """What the policy of the run makes of IDS_BL, or without its adapter another model of its family."""
        config = resolved(self.settings, self.output.parent)
        policy = load_policy(config.model if at is None else replace(config.model, path=str(at)))
        if at is None:
            load_adapter(self.adapter().parent, add_lora(policy, config.lora, seed=9).eval())
        with torch.no_grad():
            logits_BLV = policy.logits(IDS_BL, torch.ones_like(IDS_BL, dtype=torch.bool))
        return comparable(logits_BLV[:, 1:] if self.name == "dream" else logits_BLV)

    def of(self, model: torch.nn.Module) -> torch.Tensor:
        """What the class of its authors makes of IDS_BL."""
        with torch.no_grad():
            logits_BLV = model(input_ids=IDS_BL).logits
        return comparable(logits_BLV[:, :-1] if self.name == "dream" else logits_BLV)  # at l-1 it scores token l


def comparable(logits_BLV: torch.Tensor) -> torch.Tensor:
    """Without the mask and rows that are no tokens, which ours never scores."""
    return logits_BLV[..., :4093].float()


@pytest.fixture(scope="module", params=list(BASES))
def trained(request, tmp_path_factory, tiny_in) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    base = with_code(BASES[request.param](folder / "base"), request.param)
    settings = changed(tiny_in(folder), model={"path": str(base)}, optim={"learning_rate": 0.02})
    settings = changed(settings, run={"keep_checkpoints": 9, "eval_steps": 1 if request.param == "dream" else 0})
    return Trained(request.param, base, settings, go(settings, folder))


def authors(folder: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def adapted(base: Path, adapter: Path) -> torch.nn.Module:
    """As `peft` does it, with nothing to warn of."""
    model = authors(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what peft says of keys without a place
        return PeftModel.from_pretrained(model, adapter)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# ------------------------------------------------------------------------------------------------------- adapters
def test_a_checkpoint_and_an_export_load_in_peft_on_the_class_of_the_authors(trained, tmp_path):
    out = export(trained.output, False, "latest", tmp_path / "out", None)
    untrained, ours = trained.of(authors(trained.base)), trained.logits()
    assert (ours - untrained).abs().max() > 1e-2
    for folder in (trained.adapter(), out):
        told = json.loads((folder / "adapter_config.json").read_text())
        assert told["task_type"] is None and told["peft_type"] == "LORA" and told["inference_mode"]
        model = adapted(trained.base, folder)
        torch.testing.assert_close(trained.of(model), ours, rtol=0, atol=1e-6)
        on = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
        assert len(on) == 21 and not [name for name in on if name in ("lm_head", "model.transformer.ff_out")]
    assert files(out)["adapter_model.safetensors"] == files(trained.adapter())["adapter_model.safetensors"]
    assert json.loads((trained.adapter() / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        trained.base
    )


def test_a_layer_that_is_called_like_the_head_does_not_adapt_the_head(trained, tmp_path):
    config = resolved(changed(trained.settings, lora={"targets": ["down_proj"]}), tmp_path)
    policy = add_lora(load_policy(config.model), config.lora, seed=9)
    tensors = to_original(adapter_of(policy), policy.names)
    save_file(
        {name: tensor.detach().clone() for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings_of(policy, tensors), default=sorted))
    model = adapted(trained.base, tmp_path).base_model.model
    on = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    blocks = "model.transformer.blocks.{}.ff_out" if trained.name == "llada" else "model.layers.{}.mlp.down_proj"
    assert on == [blocks.format(i) for i in range(3)]


def old_format(trained: Trained, folder: Path) -> Path:
    """A run as it was saved before adapters had their base's names."""
    output = shutil.copytree(trained.output, folder / "old")
    back = {llada_name(f"{layer}.weight").removesuffix(".weight"): layer for layer in own_layers()}
    for path in output.glob("checkpoints/*/adapter"):
        if trained.name == "llada":
            renamed = {
                factor_name(back[layer_of(name)], name.split(".")[-2]): tensor
                for name, tensor in load_file(path / "adapter_model.safetensors").items()
            }
            save_file(renamed, path / "adapter_model.safetensors", {"format": "pt"})
        settings = json.loads((path / "adapter_config.json").read_text())
        settings |= {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        (path / "adapter_config.json").write_text(json.dumps(settings))
        resealed(path.parent)
    return output


def own_layers() -> list[str]:
    parts = (
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
    )
    return [f"model.layers.{i}.{part}" for i in range(3) for part in parts.split()]


def test_an_older_checkpoint_is_resumed_and_exported_as_well(trained, tmp_path):
    old = old_format(trained, tmp_path)
    out, expected = export(old, False, "2", tmp_path / "out", None), tmp_path / "expected"
    export(trained.output, False, "2", expected, None)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    if trained.name == "llada":  # whose names differ
        shutil.copytree(trained.output, tmp_path / "new")
        run = {"steps": 3, "eval_steps": 0, "resume_from_checkpoint": "latest"}
        old, new = (go(trained.settings, tmp_path, output_dir=name, **run) for name in ("old", "new"))
        assert adapter(old, 3) == adapter(new, 3) != adapter(old, 2)


# --------------------------------------------------------------------------------------------------------- merged
def test_a_merged_model_is_the_base_in_its_own_format_with_the_adapter_in_it(trained, tmp_path):
    out = export(trained.output, True, "latest", tmp_path / "out", None)
    ours = trained.logits()
    torch.testing.assert_close(trained.logits(out), ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(trained.of(authors(out)), ours, rtol=0, atol=1e-5)
    before, after = files(trained.base), files(out)
    assert after.keys() - before.keys() == {"README.md"} and before.keys() <= after.keys()
    changed_files = {name for name in before if before[name] != after[name]}
    assert {Path(name).suffix for name in changed_files} == {".safetensors"} and len(changed_files) == 2
    old, new = weights(trained.base), weights(out)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(moved) == 21 and old.keys() == new.keys()


def in_dtype(trained: Trained, folder: Path, dtype: torch.dtype) -> Path:
    """The base, stored in another dtype."""
    base = shutil.copytree(trained.base, folder / "base")
    for path in base.glob("*.safetensors"):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    return base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_merged_weight_is_the_exact_sum_rounded_to_the_files_dtype(trained, tmp_path, dtype):
    """Within half a unit of its last place, and before that what float32 loses in a sum of numbers around 1."""
    base, out = in_dtype(trained, tmp_path, dtype), tmp_path / "out"
    out.mkdir()
    tensors = load_file(trained.adapter() / "adapter_model.safetensors")
    write_merged(base, out, plan(base, tensors, 2.0))
    old, new = weights(base), weights(out)
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    for layer in layers:
        a, b = (tensors[f"{layer}.lora_{x}.weight"].double() for x in "AB")
        name = f"{layer.removeprefix('base_model.model.')}.weight"
        exact = old[name].double() + 2.0 * b @ a
        assert new[name].dtype == dtype and not torch.equal(new[name], old.pop(name))
        unit = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        lost = 0.0 if dtype == torch.float64 else 2e-7
        assert ((new[name].double() - exact).abs() <= 0.5 * unit + lost).all()
    assert len(layers) == 21 and all(torch.equal(tensor, new[name]) for name, tensor in old.items())


def test_a_sum_beyond_half_precision_is_refused(trained, tmp_path):
    base, out = in_dtype(trained, tmp_path, torch.float16), tmp_path / "out"
    out.mkdir()
    tensors = load_file(trained.adapter() / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="with the adapter it holds values beyond F16"):
        write_merged(base, out, plan(base, tensors, 1e9))


def test_a_merged_model_in_bfloat16_is_near_the_adapter_beside_it(trained, tmp_path):
    """Logits of a standard deviation of 0.85 move by 0.04 at most here: weights have 8 bits, and are rounded again."""
    base, out = in_dtype(trained, tmp_path, torch.bfloat16), tmp_path / "out"
    shutil.copytree(base, out)
    tensors = load_file(trained.adapter() / "adapter_model.safetensors")
    write_merged(base, out, plan(base, tensors, 2.0))
    here = replace(trained, settings=changed(trained.settings, model={"path": str(base)}))
    apart = (trained.logits(out) - here.logits()).abs().max()
    print(f"\nmerged in bfloat16: logits move by {apart:.4f} of {here.logits().std():.2f}")
    assert 0 < apart < 0.08


def test_what_cannot_be_merged_is_refused(trained, tmp_path):
    old = shutil.copytree(trained.output, tmp_path / "quantized")
    for folder in old.glob("checkpoints/*"):
        if folder.is_dir():
            settings = yaml.safe_load((folder / "config.yaml").read_text())
            settings["model"]["quantize"] = "nf4"
            (folder / "config.yaml").write_text(yaml.safe_dump(settings))
            resealed(folder)
    with pytest.raises(ConfigError, match=r"was trained on a base in nf4 .*: export the adapter, without --merge"):
        export(old, True, "latest", tmp_path / "out", None)
    export(old, False, "latest", tmp_path / "adapter", None)
    base = shutil.copytree(trained.base, tmp_path / "base")
    tensors = load_file(trained.adapter() / "adapter_model.safetensors")
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ConfigError, match="is quantized"):
        plan(base, tensors, 2.0)
    (base / "config.json").write_text(json.dumps(raw))
    name = sorted(tensors)[0]
    with pytest.raises(ConfigError, match=r"has no tensor model\.elsewhere\.weight"):
        plan(base, {f"base_model.model.model.elsewhere.lora_{x}.weight": tensors[name] for x in "AB"}, 2.0)
    wide = {key: torch.zeros(t.shape[0] + 1, t.shape[1]) if "lora_B" in key else t for key, t in tensors.items()}
    with pytest.raises(ConfigError, match=r"has shape .*, and the adapter's update"):
        plan(base, wide, 2.0)
    for path in base.glob("*.safetensors"):
        save_file({key: t.to(torch.float8_e4m3fn) for key, t in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match="is stored as F8_E4M3"):
        plan(base, tensors, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "quantized"]


# ------------------------------------------------------------------------------------- what is written, and what not
@pytest.fixture
def one(trained, request) -> Trained:
    if trained.name != "dream":
        pytest.skip("the same for both families")
    return trained


def test_another_base_is_refused_and_a_moved_one_found(trained, tmp_path):
    other, moved = shutil.copytree(trained.base, tmp_path / "other"), shutil.copytree(trained.base, tmp_path / "moved")
    path = sorted(other.glob("*.safetensors"))[0]
    save_file({key: t + 0.01 for key, t in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match=r"its weights differ: say with --model where that is now"):
        export(trained.output, True, "latest", tmp_path / "out", str(other))
    with pytest.raises(ConfigError, match=r"--model /none: no such folder$"):
        export(trained.output, True, "latest", tmp_path / "out", "/none")
    assert not (tmp_path / "out").exists()
    here, there = (
        export(trained.output, True, "latest", tmp_path / name, at) for name, at in (("a", None), ("b", moved))
    )
    assert files(here) == files(there)


def test_a_base_of_the_hub_is_named_by_its_id_and_commit(one, tmp_path, monkeypatch, capfd):
    commit, repo = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--org--policy"
    snapshot = repo / "snapshots" / commit
    shutil.copytree(one.base, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for number, path in enumerate(("org/policy", str(snapshot))):
        run = go(changed(one.settings, model={"path": path}), tmp_path, output_dir=f"{number}", eval_steps=0, steps=1)
        out, merged = (export(run, merge, "latest", tmp_path / f"{number}_{merge}", None) for merge in (False, True))
        told = json.loads((out / "adapter_config.json").read_text())
        assert (told["base_model_name_or_path"], told["revision"]) == ("org/policy", commit)
        for folder in (out, merged):
            card = (folder / "README.md").read_text()
            assert front(card)["base_model"] == "org/policy" and f"| base | `org/policy` at commit `{commit}` |" in card
        assert (merged / "modeling_dream.py").read_bytes() == (one.base / "modeling_dream.py").read_bytes()
    assert "lacks" not in capfd.readouterr().err
    (snapshot / "modeling_dream.py").unlink()
    export(run, True, "latest", tmp_path / "without", None)
    assert "lacks modeling_dream.py, which its config.json names" in capfd.readouterr().err


def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(one, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    (tmp_path / "file").touch()
    for merge in (False, True):
        with pytest.raises(ConfigError, match="taken is there already and not empty: name another folder"):
            export(one.output, merge, "latest", taken, None)
        with pytest.raises(ConfigError, match="file is not a folder"):
            export(one.output, merge, "latest", tmp_path / "file", None)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        try:
            with pytest.raises(ConfigError, match=r"out cannot be written: .*File too large"):
                export(one.output, merge, "latest", tmp_path / "out", None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
    (tmp_path / "empty").mkdir()
    assert "README.md" in files(export(one.output, False, "latest", tmp_path / "empty", None))


def test_which_checkpoint_is_meant(one, tmp_path, capfd):
    output, own = one.output, files(one.adapter(1))["adapter_model.safetensors"]
    first = output / "checkpoints" / "step_000001"
    ways = [(output, "1"), (output, "0001"), (output, "step_000001"), (output, str(first)), (first, "latest")]
    for number, (run, which) in enumerate(ways):
        out = export(run, False, which, tmp_path / str(number), None)
        assert files(out)["adapter_model.safetensors"] == own
        card = (out / "README.md").read_text()
        assert "after step 1 of 2" in card and "step 1\n" in card and "step 2\n" not in card
    alone = shutil.copytree(first, tmp_path / "alone")
    assert "metrics of the run are not known" in (export(alone, False, "latest", None, None) / "README.md").read_text()
    assert (tmp_path / "export" / "alone").is_dir()
    for run, which, words in [
        (tmp_path / "none", "latest", "no such folder"),
        (tmp_path, "latest", "holds no checkpoint"),
        (output, "7", "has those of the steps 1, 2"),
        (output, "last", "expected `latest`, a step or the folder"),
        (first, "1", "is a checkpoint itself"),
    ]:
        with pytest.raises(ConfigError, match=words):
            export(run, False, which, tmp_path / "out", None)
    spoiled = shutil.copytree(output, tmp_path / "spoiled")
    (spoiled / "checkpoints" / "step_000002" / "state.pt").write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"is damaged: state\.pt"):
        export(spoiled, False, "2", tmp_path / "out", None)
    capfd.readouterr()
    assert files(export(spoiled, False, "latest", tmp_path / "out", None))["adapter_model.safetensors"] == own
    assert "step_000002 is damaged" in capfd.readouterr().err


def test_the_command_names_the_folder_and_how_to_publish_it(one, tmp_path, capfd):
    output = shutil.copytree(one.output, tmp_path / "run")
    for words, name in (([], "step_000002"), (["--merge"], "step_000002_merged")):
        main(["export", str(output), *words])
        out = capfd.readouterr().out
        folder = output / "export" / name
        kind = "model" if words else "adapter"
        assert out == f"{kind}: {folder}\nto publish it: hf upload my-org/name {folder}\n"
        assert (folder / "README.md").is_file()
        with pytest.raises(SystemExit) as exit_:
            main(["export", str(output), *words])
        assert exit_.value.code == 2 and "there already and not empty" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------- the card
def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_tells_where_the_model_comes_from(one, tmp_path):
    trained = one
    for merge in (False, True):
        card = (export(trained.output, merge, "latest", tmp_path / f"out{merge}", None) / "README.md").read_text()
        told = front(card)
        assert told["base_model"] == "base" and told["library_name"] == ("transformers" if merge else "peft")
        assert told["pipeline_tag"] == "text-generation" and "license" not in told
        about = json.loads((trained.adapter().parent / "about.json").read_text())
        assert about["prompts"] in card and about["model"]["weights"][:16] in card
        assert ("commit not known" in card) == (about["commit"] is None) and (about["commit"] or "") in card
        assert "eval/reward" in card and "eval/judge" in card and "step 2\n" in card
        names = {part: public_name(trained.settings[part]["path"]) for part in ("reward", "judge")}
        assert f"| rewards | `{names['reward']}`" in card and f"| guidance | entrgi by `{names['reward']}`" in card
        assert f"| judge, never trained against | `{names['judge']}`" in card
        assert "learning_rate: 0.02" in card and "save_steps" not in card
        assert str(trained.output.parent) not in card and "/tmp" not in card and str(Path.home()) not in card
        assert ast.parse(re.findall(r"```python\n(.*?)```", card, re.S)[0])
        assert {line.count(" | ") for line in card.splitlines() if line.startswith("| ")} == {1}
    settings = json.loads((tmp_path / "outFalse" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base"


def test_names_that_a_card_may_show():
    assert public_name("Dream-org/Dream-v0-Instruct-7B") == "Dream-org/Dream-v0-Instruct-7B"
    assert public_name("/home/me/models/dream") == public_name("models/mine/dream/") == "dream"
    snapshot = f"/home/me/.cache/huggingface/hub/models--GSAI-ML--LLaDA-8B-Instruct/snapshots/{'a' * 40}"
    assert public_name(snapshot) == "GSAI-ML/LLaDA-8B-Instruct"
    assert public_name(str(REPO / "recipes")) == "recipes" and public_name("no/folder") == "no/folder"
    assert public_name("/") == "local"


# --------------------------------------------------------------------------------------------------------- the README
def test_the_documented_five_lines_load_an_adapter(trained, tmp_path):
    [block] = [b for b in re.findall(r"```python\n(.*?)```", (REPO / "docs/usage.md").read_text(), re.S) if "peft" in b]
    assert len([line for line in block.splitlines() if line]) <= 5
    places = {"GSAI-ML/LLaDA-8B-Instruct": trained.base, "runs/mine/export/step_000500": trained.adapter()}
    for name, folder in places.items():
        assert block.count(f'"{name}"') == 1
        block = block.replace(f'"{name}"', repr(str(folder)))
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what peft says of keys without a place
        exec(block, found)
    torch.testing.assert_close(trained.of(found["model"]), trained.logits(), rtol=0, atol=1e-6)
