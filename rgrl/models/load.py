"""Load a diffusion LM from its authors' checkpoint. No remote code is run, no pickle is opened."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rgrl.config import ModelConfig
from rgrl.errors import ConfigError
from rgrl.hub import fetch_checkpoint, read_json, weight_files
from rgrl.models.families import Family, find_family
from rgrl.models.fingerprint import fingerprint
from rgrl.models.policy import Policy


def load_policy(config: ModelConfig | str | Path, device: torch.device | str = "cpu") -> Policy:
    """Load a checkpoint of a known family from a folder or the Hub, frozen and in evaluation mode.

    A path alone means the default settings. Raises `ConfigError` for an unknown family, absent or ill-fitting weights,
    or a tokenizer without a mask.
    """
    if not isinstance(config, ModelConfig):
        config = ModelConfig(path=str(config))
    folder = fetch_checkpoint(config.path, "model.path")
    raw = read_json(folder / "config.json")
    family = find_family(raw.get("model_type"), config.family)
    tokenizer = _load_tokenizer(family, folder)
    mask_id = raw.get("mask_token_id", tokenizer.mask_token_id)
    if mask_id is None:
        raise ConfigError(f"{folder}: neither config.json nor the tokenizer names a mask token")
    if not 0 <= mask_id < len(tokenizer):
        raise ConfigError(f"{folder}: the mask token {mask_id} is not among the tokenizer's {len(tokenizer)} tokens")
    try:
        decoder = family.make_config(raw)
    except (TypeError, StrictDataclassError) as error:
        raise ConfigError(f"{folder / 'config.json'} does not describe a {family.name} model: {error}") from error
    decoder.is_causal = False
    weights = {family.rename(name): tensor for name, tensor in _read_weights(folder).items()}
    causal_lm = _fill(family, decoder, weights, getattr(torch, config.dtype), folder)
    # Only now: what has just been read is in memory, so it comes faster than from the disk.
    identity = {"family": family.name} | fingerprint(folder)
    policy = Policy(causal_lm.to(device), tokenizer, family, mask_id, config.path, identity)
    return policy.requires_grad_(False).eval()


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


def _read_weights(folder: Path) -> dict[str, Tensor]:
    names = weight_files(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ConfigError(f"{folder} has no weights: expected {', '.join(missing) or 'model.safetensors'}")
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            weights.update(load_file(folder / name))
        except SafetensorError as error:
            raise ConfigError(f"{folder / name} is not a readable safetensors file: {error}") from error
    return weights


def _fill(
    family: Family, config: PreTrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> PreTrainedModel:
    tied = config.tie_word_embeddings
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in family.model_class(config).state_dict().items()}
    if tied:
        expected.pop("lm_head.weight", None)
        weights.pop("lm_head.weight", None)
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    if missing or extra:
        raise ConfigError(
            f"{folder}: the weights don't fit config.json; {len(missing)} missing (first: {(missing or ['-'])[0]}), "
            f"{len(extra)} unknown (first: {(extra or ['-'])[0]})"
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ConfigError(f"{folder}: {name} has shape {tuple(weights[name].shape)}, config.json implies {shape}")
    return family.model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
