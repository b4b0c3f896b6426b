"""What a field of config.json means to a family: used, known to be harmless, or refused by its name."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from rgrl.errors import ConfigError

# Written by libraries into any config. They say where a model comes from, or how something else than a forward pass
# is done by default.
METADATA = frozenset(
    # who made it, with what
    "architectures auto_map model_type name_or_path _name_or_path _commit_hash transformers_version torch_dtype dtype "
    "tokenizer_class processor_class finetuning_task task_specific_params problem_type id2label label2id num_labels "
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation "
    "_experts_implementation unsloth_fixed unsloth_version gradient_checkpointing "
    # what a forward pass returns or keeps
    "use_cache output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript "
    "use_return_dict chunk_size_feed_forward is_decoder cross_attention_hidden_size num_logits_to_keep "
    # how weights were drawn
    "initializer_range "
    # tokens that inputs are built from; those that end a text are looked at elsewhere
    "bos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id forced_bos_token_id "
    "forced_eos_token_id begin_suppress_tokens suppress_tokens prefix "
    # how text is sampled elsewhere
    "max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values "
    "exponential_decay_length_penalty tf_legacy_loss use_bfloat16".split()
)
# What must have these values wherever it is named: other ones are another architecture.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "is_causal": (False,),
}

# Keys of rotary parameters besides the kind and the base: those that a kind needs, and those that it may have.
_ROPE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        tuple(
            "original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
            "truncate".split()
        ),
    ),
}


@dataclass(frozen=True)
class Fields:
    """The fields that a family knows, besides `METADATA`."""

    used: frozenset[str]
    harmless: frozenset[str] = frozenset()  # change no number in a forward pass, whatever their value
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # harmless at these values


def words(*lines: str) -> frozenset[str]:
    """The words of some lines."""
    return frozenset(word for line in lines for word in line.split())


def fields_of(config: PreTrainedConfig) -> Fields:
    """Those that transformers' own class of a config has, for a family that passes all of them on."""
    plain = type(config)()
    legacy = {"rope_theta", "rope_scaling"} if hasattr(plain, "rope_parameters") else set()
    return Fields(frozenset({*plain.to_dict(), *plain.attribute_map, *legacy, "mask_token_id"}))


def check_fields(raw: Mapping[str, Any], fields: Fields, family: str) -> None:
    """Refuse a field of config.json that is not known, or not with this value, by its name. Raises `ConfigError`.

    null means that a field is not set.
    """
    only = {**_NEUTRAL, **fields.only}
    for name, value in raw.items():
        if value is None or name in fields.used or name in fields.harmless:
            continue
        if name in only:
            if not any(type(value) is type(good) and value == good for good in _numbers(only[name])):
                good = " or ".join(json.dumps(value) for value in only[name])
                raise ConfigError(f"`{name}` is {_shown(value)}; {family} models are supported with {good}")
        elif name not in METADATA:
            raise ConfigError(f"`{name}` ({_shown(value)}) is not known to {family} models")


def _numbers(values: Iterable[Any]) -> list[Any]:
    """1 and 1.0 are the same number, True is none."""
    values = list(values)
    return values + [kind(v) for v in values for kind in (int, float) if type(v) in (int, float) and v == kind(v)]


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_sizes(raw: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise `ConfigError` unless fields that are set are whole numbers of at least 1."""
    for name in names:
        value = raw.get(name)
        if value is not None and not (type(value) is int and 1 <= value < 2**31):
            raise ConfigError(f"`{name}` is {_shown(value)}; expected a whole number of at least 1")


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false, and false where it is not set. Raises `ConfigError`."""
    value = raw.get(name)
    if value not in (None, True, False) or type(value) in (int, float):
        raise ConfigError(f"`{name}` is {_shown(value)}; expected true or false")
    return bool(value)


def positive(raw: Mapping[str, Any], name: str, default: float) -> float:
    """A field that is a number above 0, and `default` where it is not set. Raises `ConfigError`."""
    value = raw.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"`{name}` is {_shown(value)}; expected a number above 0")
    return float(value)


def rope_parameters(
    raw: Mapping[str, Any], family: str, kinds: tuple[str, ...] = tuple(_ROPE), base: float = 10000.0
) -> dict[str, Any]:
    """Rotary parameters as transformers takes them, from `rope_theta`, `rope_scaling` and `rope_parameters`.

    Raises `ConfigError` for kinds other than `kinds`, of which frequencies must not depend on the text's length, for
    keys that a kind does not have, and where two places disagree.
    """
    found: dict[str, Any] = {}
    places = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    for place, given in places.items():
        read = _read_rope(place, given, family, kinds)
        if found and {**found, **read} != {**read, **found}:
            raise ConfigError("`rope_scaling` and `rope_parameters` disagree")
        found |= read
    theta = positive(raw, "rope_theta", found.get("rope_theta", base))
    if found.get("rope_theta", theta) != theta:
        raise ConfigError(f"two bases: `rope_theta` {theta:g}, and {found['rope_theta']:g} in `{max(places)}`")
    return {"rope_type": "default", **found, "rope_theta": theta}


def _read_rope(place: str, given: Any, family: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigError(f"`{place}` is {_shown(given)}; expected an object, or null")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in kinds or given.get("type", kind) != kind:
        raise ConfigError(
            f"`{place}` is of kind {_shown(given.get('type', kind) if kind in kinds else kind)}; "
            f"{family} models are supported with {', '.join(kinds)}"
        )
    needed, optional = _ROPE[kind]
    read: dict[str, Any] = {"rope_type": kind}
    for name, value in given.items():
        if name in ("type", "rope_type") or value is None or (name == "partial_rotary_factor" and value == 1):
            continue
        if name not in (*needed, *optional, "rope_theta"):
            raise ConfigError(f"`{place}.{name}` ({_shown(value)}) is not known for kind {kind!r}")
        if name == "truncate":
            flag({f"{place}.truncate": value}, f"{place}.truncate")
        elif name == "original_max_position_embeddings":
            check_sizes({f"{place}.{name}": value}, [f"{place}.{name}"])
        else:
            positive({f"{place}.{name}": value}, f"{place}.{name}", 1.0)
        read[name] = value
    for less, more in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if less in read and more in read and not read[less] < read[more]:
            raise ConfigError(f"`{place}.{less}` ({read[less]}) must be below `{place}.{more}` ({read[more]})")
    if read.get("factor", 1) < 1:
        raise ConfigError(f"`{place}.factor` is {read['factor']}; expected at least 1")
    if missing := [name for name in needed if name not in read]:
        raise ConfigError(f"`{place}` of kind {kind!r} lacks `{missing[0]}`")
    return read
