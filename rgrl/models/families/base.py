"""What a model family is: how to read its authors' checkpoints and logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rgrl.errors import ConfigError
from rgrl.models.families.fields import Fields
from rgrl.models.readout import linear_head


@dataclass(frozen=True)
class Family:
    """How to read one family's checkpoints and its logits."""

    name: str
    model_type: str  # as in the checkpoint's config.json
    model_class: type[PreTrainedModel]
    make_config: Callable[[dict[str, Any]], PreTrainedConfig]
    rename: Callable[[str], str]  # tensor name in the checkpoint -> in transformers' class
    load_tokenizer: Callable[[Path], PreTrainedTokenizerBase]
    shifted: bool  # the state at l-1 scores token l
    end_of_turn: str  # token that ends an answer, besides end-of-text, where the tokenizer has it
    chat_template: str  # used where the checkpoint has none
    fields: Fields | None = None  # what config.json may hold; None: what the class that `make_config` makes has
    head: Callable[[PreTrainedModel, Tensor, int], Tensor] = linear_head  # model, states (..., H), V -> logits (..., V)
    targets: tuple[
        str, ...
    ] = ()  # names of the linear layers that `lora.targets: [auto]` adapts; empty: all but the head


def require(config: dict[str, Any], keys: tuple[str, ...], family: str) -> None:
    """Raise `ConfigError` unless config.json has all of `keys`."""
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ConfigError(f"config.json of this {family} checkpoint lacks {', '.join(missing)}")
