"""Load a diffusion LM from its authors' checkpoint. No remote code is run, no pickle is opened."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rgrl.config import ModelConfig
from rgrl.errors import ConfigError
from rgrl.hub import fetch_checkpoint, read_json
from rgrl.models.attention import attend_both_ways, check_attention, check_kernel
from rgrl.models.families import Family, find_family
from rgrl.models.families.fields import check_fields, fields_of
from rgrl.models.fingerprint import fingerprint
from rgrl.models.policy import Policy
from rgrl.models.quantize import check_quantize, check_quantized, quantization
from rgrl.models.reader import Reader
from rgrl.models.tokens import control_token, end_ids, find_mask
from rgrl.models.weights import (
    Stored,
    check_finite,
    check_floats,
    check_layer_count,
    check_unquantized,
    find_weights,
    layer_numbers,
    read_tensors,
)


def load_policy(config: ModelConfig | str | Path, device: torch.device | str = "cpu") -> Policy:
    """Load a checkpoint of a known family from a folder or the Hub, frozen and in evaluation mode.

    A path alone means the default settings. Raises `ConfigError` for an unknown family, a config that is not understood
    to the last field, absent or ill-fitting weights, or a tokenizer without a mask (docs/loading.md).
    """
    if not isinstance(config, ModelConfig):
        config = ModelConfig(path=str(config))
    check_quantize(config.quantize)
    check_kernel(config.attn_implementation, config.dtype, device)
    folder = fetch_checkpoint(config.path, "model.path", config.revision)
    raw = read_json(folder / "config.json")
    check_unquantized(raw, str(folder))
    family = find_family(raw.get("model_type"), config.family)
    stored = find_weights(folder, str(folder))
    check_layer_count(raw, len(layer_numbers(map(family.rename, stored))), str(folder))
    decoder = _make_config(family, raw, folder)
    names = check_fit(family, decoder, stored, folder)
    tokenizer = _load_tokenizer(family, folder)
    raw, family = with_settings(config, raw, tokenizer, family)
    mask_id = find_mask(raw, tokenizer, decoder.vocab_size, str(folder))
    ends = end_ids(raw, tokenizer, str(folder))
    causal_lm = _build(family, decoder, _read(names, decoder, folder), config, device)
    # Only now: what has just been read is in memory, so it comes faster than from the disk.
    identity = {"family": family.name} | fingerprint(folder)
    policy = Policy(causal_lm, tokenizer, family, mask_id, config.path, identity)
    policy.reader.end_with(ends)
    policy.names |= {own: name for own, (name, _) in names.items()}
    return policy.requires_grad_(False).eval()


def load_reader(config: ModelConfig) -> Reader:
    """How the policy of these settings reads, without its weights. Raises `ConfigError` like `load_policy`."""
    folder = fetch_checkpoint(config.path, "model.path", config.revision, weights=False)
    raw = read_json(folder / "config.json")
    family = find_family(raw.get("model_type"), config.family)
    decoder = _make_config(family, raw, folder)
    tokenizer = _load_tokenizer(family, folder)
    raw, family = with_settings(config, raw, tokenizer, family)
    mask_id = find_mask(raw, tokenizer, decoder.vocab_size, str(folder))
    reader = Reader(tokenizer, family, mask_id, decoder.vocab_size, decoder.max_position_embeddings)
    reader.end_with(end_ids(raw, tokenizer, str(folder)))
    return reader


def _make_config(family: Family, raw: dict[str, Any], folder: Path) -> PreTrainedConfig:
    """The decoder's config, attending both ways. Every field of config.json counts, or is known not to."""
    try:
        decoder = family.make_config(raw)
        check_fields(raw, family.fields or fields_of(decoder), family.name)
    except (TypeError, ValueError, KeyError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{folder / 'config.json'} does not describe a {family.name} model that is supported: {reason}"
        ) from error
    decoder.is_causal = False
    return decoder


def with_settings(
    config: ModelConfig, raw: dict[str, Any], tokenizer: PreTrainedTokenizerBase, family: Family
) -> tuple[dict[str, Any], Family]:
    """config.json and the family, with what the settings say in their place. Raises `ConfigError`."""
    if config.shifted is not None:
        family = replace(family, shifted=config.shifted)
    if config.end_token is not None:
        control_token(config.end_token, tokenizer, "model.end_token")
        family = replace(family, end_of_turn=config.end_token)
    if config.mask_token is not None:
        raw = raw | {"mask_token_id": control_token(config.mask_token, tokenizer, "model.mask_token")}
        tokenizer.mask_token = config.mask_token
        if config.mask_token == family.end_of_turn:
            raise ConfigError(f"`model.mask_token`: {config.mask_token!r} ends an answer, so it cannot hide a place")
    return raw, family


def _load_tokenizer(family: Family, folder: Path) -> PreTrainedTokenizerBase:
    # Without its files transformers returns a tokenizer of no words, and no error.
    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        raise ConfigError(f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    try:
        return family.load_tokenizer(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder} has no tokenizer that reads as {family.name}'s") from error


def check_fit(
    family: Family, config: PreTrainedConfig, stored: dict[str, Stored], folder: Path
) -> dict[str, tuple[str, Path]]:
    """Compare file headers with what the config implies, before anything is built.

    Returns the stored name and the file of each tensor by its name in the model. Raises `ConfigError` for other layers,
    tensors, shapes, formats than are implied, and for heads that do not divide.
    """
    names: dict[str, str] = {}
    for name in sorted(stored):
        if (own := family.rename(name)) in names:
            raise ConfigError(f"{folder}: {names[own]} and {name} are both {own}")
        if not own.endswith("rotary_emb.inv_freq"):  # made anew from the config
            names[own] = name
    # Layers first: it costs nothing, and the rest takes as long as there are layers.
    _check_layers(config.num_hidden_layers, layer_numbers(names), folder)
    expected = _shapes(family, config, folder)
    head = "lm_head.weight"
    if config.tie_word_embeddings and head not in names:
        expected.pop(head, None)
    missing, extra = sorted(expected.keys() - names.keys()), sorted(names[n] for n in names.keys() - expected.keys())
    if missing == [head]:
        raise ConfigError(f"{folder}: the weights have no head, and config.json does not tie it to the embedding")
    if missing or extra:
        raise ConfigError(
            f"{folder}: the weights don't fit config.json; {len(missing)} missing (first: {(missing or ['-'])[0]}), "
            f"{len(extra)} unknown (first: {(extra or ['-'])[0]})"
        )
    for own, shape in expected.items():
        if (found := stored[names[own]].shape) != shape:
            raise ConfigError(f"{folder}: {names[own]} has shape {found}, config.json implies {shape}")
    check_floats({name: stored[name] for name in names.values()}, str(folder))
    _check_heads(config, folder)
    return {own: (name, stored[name].path) for own, name in names.items()}


def _check_heads(config: PreTrainedConfig, folder: Path) -> None:
    """Raise `ConfigError` for heads that do not divide what they must, although shapes fit."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size / heads
    if heads % kv_heads or width % 2:  # rotary positions take a head's numbers in pairs
        raise ConfigError(
            f"{folder}: config.json has {heads} heads of {width:g} numbers and {kv_heads} heads of keys and values; "
            "the first must be a multiple of the last, and a head's numbers even"
        )


def _check_layers(number: int, found: set[int], folder: Path) -> None:
    """Raise `ConfigError` unless the weights have the layers from 0 on that the config counts."""
    if len(found) == number and max(found, default=-1) == number - 1:
        return
    absent = next(i for i in range(len(found) + 1) if i not in found)
    told = f"; layer {absent} is missing" if max(found, default=-1) > absent else ""
    raise ConfigError(f"{folder}: config.json has {number} layers and the weights {len(found)}{told}")


def _shapes(family: Family, config: PreTrainedConfig, folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the config implies, by its name in the model. Takes no memory."""
    try:
        with torch.device("meta"):
            return {name: tuple(t.shape) for name, t in family.model_class(config).state_dict().items()}
    except (RuntimeError, ValueError, TypeError, KeyError, ArithmeticError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder / 'config.json'} describes no model that can be built: {reason}") from error


def _read(names: dict[str, tuple[str, Path]], config: PreTrainedConfig, folder: Path) -> dict[str, Tensor]:
    """The tensors by their names in the model, but for a tied head. Raises `ConfigError` for what is no number."""
    weights: dict[str, Tensor] = {}
    for path in sorted({path for _, path in names.values()}):
        tensors = read_tensors(path, str(folder))
        check_finite(tensors, str(folder))
        weights |= {own: tensors[name] for own, (name, file) in names.items() if file == path}
    if config.tie_word_embeddings and (head := weights.pop("lm_head.weight", None)) is not None:
        tables = [table for name, table in weights.items() if name.endswith("embed_tokens.weight")]
        if not all(torch.equal(head, table) for table in tables):
            raise ConfigError(
                f"{folder}: config.json ties the head to the embedding, but {names['lm_head.weight'][0]} is another "
                "matrix; untie it in config.json, or remove the tensor"
            )
    return weights


def _build(
    family: Family,
    decoder: PreTrainedConfig,
    weights: dict[str, Tensor],
    config: ModelConfig,
    device: torch.device | str,
) -> PreTrainedModel:
    """The model that holds `weights`, as the settings want it. Raises `ConfigError` where it cannot be so."""
    dtype = getattr(torch, config.dtype)
    given: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if config.quantize != "none":  # on the device itself, layer by layer, as the whole may not fit there
        given |= {"quantization_config": quantization(config.quantize, dtype), "device_map": {"": device}}
    model = family.model_class.from_pretrained(None, config=decoder, state_dict=weights, **given)
    check_quantized(model, config.quantize)
    attend_both_ways(model)
    model.to(device)
    try:
        model.set_attn_implementation(config.attn_implementation)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"`model.attn_implementation: {config.attn_implementation}`: {reason}") from error
    check_attention(model)
    return model
