"""The trainable part: a LoRA adapter in peft's own format."""

import re
from collections.abc import Sequence

import peft
import torch
from peft.tuners.lora import LoraLayer

from rgrl.config import LoraConfig
from rgrl.errors import ConfigError
from rgrl.models.dropout import RowDropout
from rgrl.models.policy import Policy


def add_lora(policy: Policy, config: LoraConfig, seed: int) -> Policy:
    """Add a float32 adapter to `policy` in place; its B factors are zero, so it changes nothing yet.

    The A factors are drawn from `seed` alone. Raises `ConfigError` as `find_layers` does.
    """
    targets = expand_targets(policy, config.targets)
    layers = find_layers(policy, targets)
    policy.causal_lm.name_or_path = policy.path  # peft writes it into the adapter's config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.peft_model = peft.get_peft_model(
            policy.causal_lm,
            peft.LoraConfig(
                r=config.r,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=targets if _names_suffice(policy, targets, layers) else layers,
                task_type="CAUSAL_LM",
            ),
        )
    if config.dropout > 0:
        adapted = [m for m in policy.causal_lm.modules() if isinstance(m, LoraLayer)]
        for number, layer in enumerate(adapted):
            layer.lora_dropout["default"] = RowDropout(config.dropout, number, policy.row_keys)
    return policy


def is_pattern(target: str) -> bool:
    """Whether an entry of `lora.targets` is a regular expression, and not a layer's name or the end of its path."""
    return re.fullmatch(r"[\w.-]+", target) is None


def expand_targets(policy: Policy, targets: Sequence[str]) -> list[str]:
    """`targets` with the names of the family's linear layers in place of `auto`, each once."""
    own = policy.family.targets or _names(linear_layers(policy))
    return list(dict.fromkeys(name for target in targets for name in (own if target == "auto" else [target])))


def find_layers(policy: Policy, targets: Sequence[str]) -> list[str]:
    """Paths of the linear layers in `policy.causal_lm` that `targets` (without `auto`) name, in their order there.

    Raises `ConfigError` for a target that names none, or that would also hit the head or the embedding.
    """
    linear, found = linear_layers(policy), set()
    for target in targets:
        for path, what in _not_adapted(policy).items():
            if _hits(target, path):
                raise ConfigError(f"`lora.targets`: {target!r} also hits {path}, {what}, which is not adapted")
        hit = {path for path in linear if _hits(target, path)}
        if not hit:
            known = ", ".join(sorted(_names(linear)))
            told = "no linear layer's path matches" if is_pattern(target) else "no layer is called"
            raise ConfigError(f"`lora.targets`: {told} {target!r}; there are {known} (first: {next(iter(linear))})")
        found |= hit
    return [path for path in linear if path in found]


def _names_suffice(policy: Policy, targets: Sequence[str], layers: Sequence[str]) -> bool:
    """Whether peft, which matches names in the same way, would adapt just `layers` by `targets` as they are."""
    hit = [path for path, _ in policy.causal_lm.named_modules() if any(_hits(target, path) for target in targets)]
    return hit == list(layers) and not any(map(is_pattern, targets))


def linear_layers(policy: Policy) -> list[str]:
    """Paths of every linear layer but the head, in their order."""
    skipped = _not_adapted(policy)
    modules = policy.causal_lm.named_modules()
    return [path for path, m in modules if isinstance(m, torch.nn.Linear) and path not in skipped]


def _names(paths: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def _not_adapted(policy: Policy) -> dict[str, str]:
    """What no target may hit, by its path. Adapting it would change every token's score, or untie tied weights."""
    model = policy.causal_lm
    modules = {"the output head": model.get_output_embeddings(), "the embedding": model.get_input_embeddings()}
    return {path: what for path, m in model.named_modules() for what, found in modules.items() if m is found}


def _hits(target: str, path: str) -> bool:
    """Whether peft would adapt `path` for `target`: as the end of the path, or as a pattern of all of it."""
    if is_pattern(target):
        return re.fullmatch(target, path) is not None
    return path == target or path.endswith(f".{target}")


def adapter_parameters(policy: Policy) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name, in a fixed order."""
    return {name: p for name, p in sorted(policy.causal_lm.named_parameters()) if p.requires_grad}


def check_gradients(policy: Policy) -> None:
    """Raise `ConfigError` unless a loss reaches every adapted layer.

    A fresh adapter has B = 0, so A's gradients are zero by construction and B's tell whether the layer learns.
    """
    ids_BL = torch.arange(8, device=policy.device).remainder(policy.vocab_size)[None]
    attention_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    logits_BLV = policy.logits(ids_BL, attention_BL)
    logits_BLV.masked_fill(logits_BLV.isinf(), 0.0).logsumexp(-1).sum().backward()
    dead = [
        name
        for name, p in adapter_parameters(policy).items()
        if "lora_B" in name and (p.grad is None or not bool(p.grad.abs().sum() > 0))
    ]
    policy.zero_grad(set_to_none=True)
    if dead:
        raise ConfigError(f"no gradient reaches the LoRA layer {dead[0]} ({len(dead)} such layers)")
