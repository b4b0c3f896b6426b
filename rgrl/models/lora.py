"""The trainable part: a LoRA adapter in peft's own format."""

import peft
import torch
from peft.tuners.lora import LoraLayer

from rgrl.config import LoraConfig
from rgrl.errors import ConfigError
from rgrl.models.dropout import RowDropout
from rgrl.models.policy import Policy


def add_lora(policy: Policy, config: LoraConfig, seed: int) -> Policy:
    """Add a float32 adapter to `policy` in place; its B factors are zero, so it changes nothing yet.

    The A factors are drawn from `seed` alone. Raises `ConfigError` if a target names no layer.
    """
    linear = {name.rsplit(".", 1)[-1] for name, m in policy.causal_lm.named_modules() if isinstance(m, torch.nn.Linear)}
    unmatched = [target for target in config.targets if target not in linear]
    if unmatched:
        raise ConfigError(f"`lora.targets`: no layer is called {unmatched[0]!r}; there are {', '.join(sorted(linear))}")
    policy.causal_lm.name_or_path = policy.path  # peft writes it into the adapter's config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.peft_model = peft.get_peft_model(
            policy.causal_lm,
            peft.LoraConfig(
                r=config.r,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=list(config.targets),
                task_type="CAUSAL_LM",
            ),
        )
    if config.dropout > 0:
        adapted = [m for m in policy.causal_lm.modules() if isinstance(m, LoraLayer)]
        for number, layer in enumerate(adapted):
            layer.lora_dropout["default"] = RowDropout(config.dropout, number, policy.row_keys)
    return policy


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
