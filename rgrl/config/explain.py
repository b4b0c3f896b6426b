"""What a bad setting's error says: the key, what is wrong, and what would be right, on one line."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError

from rgrl.errors import ConfigError

# What the same thing is called in TRL, peft, transformers and elsewhere.
ALIASES = {
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_learning_rate": "optim.learning_rate",
    "base_model": "model.path",
    "batch_size": "run.prompts_per_device",
    "attention_implementation": "model.attn_implementation",
    "attn_impl": "model.attn_implementation",
    "bf16": "model.dtype",
    "block_size": "rollout.block_length",
    "checkpoint": "run.resume_from_checkpoint",
    "clip_grad": "optim.max_grad_norm",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "dataset_split": "data.split",
    "dataset_text_field": "data.column",
    "ddp_timeout": "run.timeout_minutes",
    "diffusion_steps": "rollout.steps",
    "early_stopping": "run.max_hours",
    "epsilon": "objective.epsilon_low",
    "epsilon_high": "objective.epsilon_high",
    "eval_dataset": "data.eval_path",
    "eval_strategy": "run.eval_steps",
    "evaluation_strategy": "run.eval_steps",
    "fp16": "model.dtype",
    "generation_batch_size": "rollout.micro_batch",
    "grad_clip": "optim.max_grad_norm",
    "greedy": "eval.temperature",
    "group_size": "rollout.num_generations",
    "kl_coef": "objective.beta",
    "learning_rate_schedule": "optim.schedule",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "logging_dir": "run.output_dir",
    "logging_steps": "tracking.completions_steps",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target_modules": "lora.targets",
    "loss_type": "objective.name",
    "lr": "optim.learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "max_new_tokens": "rollout.max_completion_length",
    "max_steps": "run.steps",
    "mini_batch_size": "run.gradient_accumulation_steps",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "mask_token_id": "model.mask_token",
    "model_path": "model.path",
    "model_revision": "model.revision",
    "n_epochs": "run.steps",
    "num_epochs": "run.steps",
    "num_iterations": "optim.updates",
    "num_train_epochs": "run.steps",
    "num_training_steps": "run.steps",
    "pass_at_k": "eval.samples",
    "per_device_eval_batch_size": "rollout.micro_batch",
    "per_device_train_batch_size": "run.prompts_per_device",
    "project_name": "tracking.project",
    "quantization": "model.quantize",
    "random_masking": "objective.redraw",
    "rank": "lora.r",
    "remasking": "rollout.confidence",
    "report_to": "tracking.wandb",
    "reward_funcs": "reward.functions",
    "reward_model": "reward.path",
    "reward_model_path": "reward.path",
    "reward_weights": "reward.functions",
    "right_shift_logits": "model.shifted",
    "run_name": "tracking.name",
    "save_total_limit": "run.keep_checkpoints",
    "scale_rewards": "objective.advantage",
    "target_modules": "lora.targets",
    "torch_dtype": "model.dtype",
    "total_steps": "run.steps",
    "train_file": "data.path",
    "use_flash_attention_2": "model.attn_implementation",
    "use_wandb": "tracking.wandb",
    "validation_file": "data.eval_path",
    "wandb_project": "tracking.project",
    "warmup_ratio": "optim.warmup_steps",
}
_LIMITS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def explain(error: ValidationError, prefix: str, sections: Mapping[str, type]) -> str:
    """The first problem of a section called `prefix`, or of all sections where that is empty."""
    found = error.errors(include_url=False)[0]
    kind, value = found["type"], found.get("input")
    parts = [part for part in found["loc"] if part not in ("[key]", "[number]", "[mapping]")]
    if prefix and parts and isinstance(parts[0], int):  # given by position
        parts[0] = list(sections[prefix].__annotations__)[parts[0]]
    key = ".".join(map(str, [prefix] * bool(prefix) + parts))
    if kind == "value_error":
        said = found["ctx"]["error"]
        return str(said) if isinstance(said, ConfigError) else f"`{key}` must be {said}, not {short(value)}"
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        return unknown(key, sections)
    if kind == "dataclass_type":
        return f"`{key}` is a section with keys of its own, not the value {short(value)}"
    if kind == "too_short":
        return f"`{key}` is empty: name at least one"
    return f"`{key}` must be {_expected(kind, found, key, sections)}, not {short(value)}"


def _expected(kind: str, found: Mapping[str, Any], key: str, sections: Mapping[str, type]) -> str:
    if kind in _LIMITS:
        return _limits(found["ctx"], key, sections)
    if kind == "literal_error":
        return f"one of {found['ctx']['expected'].replace(chr(39), '').replace(' or ', ', ')}"
    named = {"finite_number": "a finite number", "list_type": "a list", "dict_type": "a mapping"}
    return named.get(kind, f"something else ({found['msg']})")


def _limits(broken: Mapping[str, Any], key: str, sections: Mapping[str, type]) -> str:
    """The limit that is broken, or the whole range where it ends at 1 or below."""
    section, _, name = key.partition(".")
    hint = typing.get_type_hints(sections[section], include_extras=True)[name.split(".")[0]]
    limits = dict(_all_limits(hint))
    if limits.get("le", limits.get("lt", 2)) <= 1:
        return range_of(hint)
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bound, value = next(iter(broken.items()))
    return f"{words[bound]} {value:,}"


def range_of(hint: Any) -> str:
    """The limits of a type such as `Annotated[Number, Gt(0), Le(1)]` in words: "in (0, 1]". Empty if it has none.

    Limits that only keep a slip out are left out.
    """
    limits = {name: limit for name, limit in _all_limits(hint) if abs(limit) <= 1000}
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if low is None or high is None:
        return "" if low is None else f"at least {low:,}" if "ge" in limits else f"above {low:,}"
    return f"in {'[' if 'ge' in limits else '('}{low:,}, {high:,}{']' if 'le' in limits else ')'}"


def _all_limits(hint: Any) -> Iterator[tuple[str, Any]]:
    kinds = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
    for part in getattr(hint, "__metadata__", ()):
        yield from ((name, getattr(part, name)) for kind, name in kinds.items() if isinstance(part, kind))
    for inner in typing.get_args(hint):
        yield from _all_limits(inner)


def unknown(key: str, sections: Mapping[str, type]) -> str:
    """The message for a key that is no setting: what may have been meant, or what there is instead."""
    section, _, name = key.partition(".")
    keys = all_keys(sections)
    if meant := _meant(key, section, name, keys):
        return f"unknown key `{key[:80]}`; did you mean {_either([f'`{k}`' for k in meant])}?"
    if section in sections:
        return f"unknown key `{key[:80]}`; `{section}` has {', '.join(k.split('.')[1] for k in keys[section])}"
    return f"unknown key `{key[:80]}`; the sections are {', '.join(sections)}"


def all_keys(sections: Mapping[str, type]) -> dict[str, list[str]]:
    """Every setting's dotted key, by section."""
    return {name: [f"{name}.{f.name}" for f in dataclasses.fields(cls)] for name, cls in sections.items()}


def _meant(key: str, section: str, name: str, keys: Mapping[str, list[str]]) -> list[str]:
    """Settings that `key` may stand for: one spelt like it, one of its name elsewhere, or what others call so."""
    leaf = key.rpartition(".")[2].replace("-", "_").lower()
    every = [k for names in keys.values() for k in names]
    by_name = [k for k in every if k.partition(".")[2] == leaf]
    if section in keys and name and (near := difflib.get_close_matches(key, keys[section], n=1, cutoff=0.8)):
        return near
    if by_name:
        return by_name
    if leaf in ALIASES:
        return [ALIASES[leaf]]
    if not name and (near := difflib.get_close_matches(key, keys, n=1, cutoff=0.7)):
        return near
    if near := difflib.get_close_matches(key, keys.get(section, []), n=1, cutoff=0.6):
        if difflib.get_close_matches(leaf, [near[0].partition(".")[2]], cutoff=0.6):
            return near
    names = sorted({k.partition(".")[2] for k in every} | ALIASES.keys())
    if near := difflib.get_close_matches(leaf, names, n=1, cutoff=0.75):
        return [k for k in every if k.partition(".")[2] == near[0]] or [ALIASES[near[0]]]
    near = difflib.get_close_matches(section, keys, n=1, cutoff=0.7)
    return [f"{near[0]}.{name}"] if near and f"{near[0]}.{name}" in every else []


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def short(value: object) -> str:
    """The value as Python writes it, cut where it is long."""
    try:
        text = repr(str(value) if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # a number of more digits than Python prints, a list in itself
        text = f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text):,} characters)"
