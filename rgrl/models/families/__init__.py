"""What distinguishes one model family from another: all of it, and only here. A family is one file.

Each family maps its authors' checkpoint onto one of transformers' own decoder classes, which attend both ways when
`config.is_causal` is False. No remote code is ever run. docs/families.md walks through adding one, here (listed below
and in `FAMILIES` of config/schema.py) or in a module of your own.
"""

from rgrl.errors import ConfigError
from rgrl.models.families.a2d import A2D
from rgrl.models.families.base import Family
from rgrl.models.families.dream import DREAM
from rgrl.models.families.llada import LLADA
from rgrl.plugins import resolve

__all__ = ["A2D", "DREAM", "FAMILIES", "LLADA", "Family", "find_family"]

FAMILIES = {"dream": DREAM, "llada": LLADA, **{family.model_type: family for family in A2D}}


def find_family(model_type: str | None, name: str = "auto") -> Family:
    """The family called `name`, or at a dotted path, or for `auto` the one whose checkpoints say `model_type`.

    The name of several, such as `a2d`, stands for the one of this `model_type`, also without its prefix (`qwen3`).
    Raises `ConfigError`.
    """
    if ":" in name:
        family = resolve(name, "model family")
        if not isinstance(family, Family):
            raise ConfigError(f"model family {name!r} is {type(family).__name__}, not a rgrl.models.families.Family")
        return family
    named = [family for family in FAMILIES.values() if name in ("auto", family.name)]
    if name != "auto" and len(named) == 1:
        return named[0]
    for family in named:
        if model_type == family.model_type:
            return family
        if model_type == family.model_type.removeprefix(f"{family.name}-"):
            if name != "auto":
                return family
            raise ConfigError(
                f"model_type {model_type!r} in config.json is of an autoregressive model; if this one was turned into "
                f"a diffusion model, set `model.family: {family.name}`"
            )
    short = [f.model_type.removeprefix(f"{f.name}-") for f in named] if name != "auto" else []
    known = ", ".join([*(family.model_type for family in named), *short])
    raise ConfigError(f"unknown model_type {model_type!r} in config.json; known: {known}")
