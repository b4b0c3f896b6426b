"""What is loaded is honoured or refused by name: adapters, configs, weights, tokens."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rgrl.checkpoint import load_adapter
from rgrl.checkpoint.format import adapter_of
from rgrl.config import LoraConfig
from rgrl.errors import ConfigError
from rgrl.models import load_policy
from rgrl.models.adapter import merge_adapter
from rgrl.models.lora import add_lora
from rgrl.rewards import load_classifier

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
