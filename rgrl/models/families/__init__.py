"""What distinguishes one model family from another: all of it, and only here. A family is one file.

Each family maps its authors' checkpoint onto one of transformers' own decoder classes, which attend both ways when
`config.is_causal` is False. No remote code is ever run. To add a family, write a file like `dream.py` and list it here
(and in `ModelConfig.family`).
"""

from rgrl.errors import ConfigError
from rgrl.models.families.base import Family
from rgrl.models.families.dream import DREAM
from rgrl.models.families.llada import LLADA

__all__ = ["DREAM", "FAMILIES", "LLADA", "Family", "find_family"]

FAMILIES = {family.name: family for family in (DREAM, LLADA)}


def find_family(model_type: str | None, name: str = "auto") -> Family:
    """The family called `name`, or for `auto` the one whose checkpoints say `model_type`. Raises `ConfigError`."""
    if name != "auto":
        return FAMILIES[name]
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise ConfigError(f"unknown model_type {model_type!r} in config.json; known: {known}")
