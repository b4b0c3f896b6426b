"""The tokens that a diffusion LM works with: the mask, and those that end a text."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from rgrl.errors import ConfigError


def find_mask(raw: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int, what: str) -> int:
    """The id of the mask token, from config.json (`raw`) and the tokenizer, for a table of `rows` embeddings.

    `what` begins errors. Raises `ConfigError` where there is none, where the two disagree, for a token that the model
    or the tokenizer lacks, that has another role, or that plain text can turn into.
    """
    named, own = raw.get("mask_token_id"), tokenizer.mask_token_id
    mask_id = own if named is None else named
    if mask_id is None:
        raise ConfigError(f"{what}: neither config.json nor the tokenizer names a mask token; set `model.mask_token`")
    if type(mask_id) is not int:
        raise ConfigError(f"{what}: `mask_token_id` is {mask_id!r} in config.json; expected the number of a token")
    if not 0 <= mask_id < len(tokenizer):
        raise ConfigError(f"{what}: the mask token {mask_id} is not among the tokenizer's {len(tokenizer)} tokens")
    if mask_id >= rows:
        raise ConfigError(f"{what}: the mask token {mask_id} is beyond the model's {rows} embeddings")
    if own is not None and own != mask_id:
        raise ConfigError(
            f"{what}: the mask token is {mask_id} in config.json and {own} ({tokenizer.mask_token}) in the tokenizer"
        )
    token = tokenizer.convert_ids_to_tokens(mask_id)
    for role, ids in _roles(raw, tokenizer).items():
        if mask_id in ids:
            raise ConfigError(f"{what}: the mask token {mask_id} ({token}) is also the {role} token")
    if not _is_control(mask_id, tokenizer):
        raise ConfigError(
            f"{what}: the mask token {mask_id} ({token}) is an ordinary token, which text can turn into; expected a "
            "special token of its own"
        )
    return mask_id


def _roles(raw: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, set[int]]:
    """The tokens of each other role, by config.json or the tokenizer."""
    return {
        words: {
            i for i in (*_ids(raw.get(f"{role}_token_id")), getattr(tokenizer, f"{role}_token_id")) if i is not None
        }
        for role, words in {"eos": "end", "bos": "begin", "pad": "padding", "unk": "unknown"}.items()
    }


def _ids(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]


def _is_control(token_id: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token is special, or an added one in markers, such as `<|mask|>` and `[MASK]`."""
    if token_id in tokenizer.all_special_ids:
        return True
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is None:
        return False
    text = str(added).strip()
    return added.special or (len(text) > 2 and not text[0].isalnum() and not text[-1].isalnum())


def end_ids(raw: dict[str, Any], tokenizer: PreTrainedTokenizerBase, what: str) -> list[int]:
    """The tokens that end a text by config.json: none, one or several.

    `what` begins errors. Raises `ConfigError` for one that the tokenizer lacks or that is an ordinary one.
    """
    found = [] if raw.get("eos_token_id") is None else _ids(raw["eos_token_id"])
    for token_id in found:
        if type(token_id) is not int or not 0 <= token_id < len(tokenizer) or not _is_control(token_id, tokenizer):
            raise ConfigError(
                f"{what}: `eos_token_id` is {raw['eos_token_id']!r} in config.json, and {token_id!r} is no special "
                "token of the tokenizer"
            )
    return found


def control_token(text: str, tokenizer: PreTrainedTokenizerBase, setting: str) -> int:
    """The id of the special token that is spelt `text`. Raises `ConfigError`, which names the `setting`, for others."""
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if _is_control(i, tokenizer)}
    if text not in added:
        known = ", ".join(added) if len(added) <= 12 else f"{', '.join(list(added)[:12])} ..."
        raise ConfigError(f"`{setting}`: {text!r} is not a special token of the tokenizer; there are {known}")
    return added[text]
