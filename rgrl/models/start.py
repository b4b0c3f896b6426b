"""Start from an adapter that exists (`lora.path`): read it, and load it into a policy that has its own."""

from pathlib import Path

from torch import Tensor

from rgrl.config import LoraConfig
from rgrl.errors import ConfigError
from rgrl.models.adapter import fit_adapter, read_adapter
from rgrl.models.lora import adapter_parameters
from rgrl.models.names import layer_of, original_layers, target_modules, to_ours
from rgrl.models.policy import Policy

# Settings of an adapter that would make it another function than plain LoRA with the same weights, and LoRA's own.
_PLAIN = {
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "target_parameters": None,
}


def read_start(config: LoraConfig) -> dict[str, Tensor]:
    """The weights of the adapter in `lora.path`, whose settings agree with `config`. Raises `ConfigError`."""
    assert config.path is not None
    folder, what = Path(config.path), f"`lora.path` {config.path}"
    if not (folder / "adapter_config.json").is_file() and (folder / "adapter" / "adapter_config.json").is_file():
        raise ConfigError(f"{what} is a checkpoint; its adapter is {folder / 'adapter'}")
    settings, tensors = read_adapter(folder, what)
    for name, plain in _PLAIN.items():
        if (value := getattr(settings, name)) != plain and value:
            raise ConfigError(f"{what}: `{name}` is {value!r} in adapter_config.json; supported: {plain!r}")
    for setting, value, own in (("r", settings.r, config.r), ("alpha", settings.lora_alpha, config.alpha)):
        if value != own:
            raise ConfigError(f"{what} was trained with {setting} {value:g}: set `lora.{setting}` to it, not {own:g}")
    return tensors


def start_from(policy: Policy, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """Load the weights of `read_start`, under the checkpoint's names or transformers', into the policy's adapter.

    Raises `ConfigError` unless they are of the layers that the adapter has, and fit.
    """
    assert policy.peft_model is not None
    what, tensors = f"`lora.path` {config.path}", to_ours(tensors, policy.names)
    layers = original_layers(policy.names).keys()
    theirs = {layer for name in tensors if (layer := layer_of(name)) is not None}
    own = {name.split(".lora_")[0] for name in adapter_parameters(policy)}
    if theirs != own and theirs <= layers:
        one = min(theirs ^ own)
        has = "has none" if one in own else "has one"
        raise ConfigError(
            f"{what} adapts other layers than `lora.targets` says (first: it {has} for {one}): set `lora.targets` to "
            f"[{', '.join(target_modules(theirs, layers))}]"
        )
    fit_adapter(policy.peft_model, tensors, what)
