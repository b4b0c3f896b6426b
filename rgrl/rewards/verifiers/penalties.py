"""Penalties, -1 ... 0: for a length outside its limits, and for repeating oneself."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from rgrl.config.kinds import Maybe, Whole
from rgrl.errors import ConfigError
from rgrl.rewards.verifiers.base import Verifier, own_settings

MOST = 10**7


@own_settings
class LengthSettings:
    most: Maybe[Annotated[Whole, Ge(0), Le(MOST)]] = None
    """Length above which there is a penalty. None: none."""
    least: Annotated[Whole, Ge(0), Le(MOST)] = 0
    """Length below which there is one."""
    slack: Annotated[Whole, Ge(0), Le(MOST)] = 0
    """How far outside these limits the penalty has grown to -1, in equal steps. 0: at once."""
    unit: Literal["words", "characters"] = "words"
    """What is counted."""

    def __post_init__(self) -> None:
        if self.most is None and not self.least:
            raise ConfigError("`length.most` or `length.least` is required: the limits of a length")
        if self.most is not None and self.least > self.most:
            raise ConfigError(f"`length.least` ({self.least}) is above `length.most` ({self.most})")


def score_length(completion: str, expected: Any, settings: Any) -> float:
    length = len(completion.split()) if settings.unit == "words" else len(completion)
    over = length - settings.most if settings.most is not None else 0
    outside = max(over, settings.least - length, 0)
    return -min(1.0, outside / (settings.slack + 1)) if outside <= settings.slack else -float(outside > 0)


@own_settings
class RepetitionSettings:
    n: Annotated[Whole, Ge(1), Le(1000)] = 3
    """Number of words, or characters, of what is compared."""
    unit: Literal["words", "characters"] = "words"
    """Of what; `characters` for scripts that have no spaces."""


def score_repetition(completion: str, expected: Any, settings: Any) -> float:
    """Minus the fraction of n-grams that stand earlier in the completion already."""
    units = completion.split() if settings.unit == "words" else list(completion)
    n = settings.n
    total = len(units) - n + 1
    if total < 1:
        return 0.0
    return len(set(zip(*(units[i:] for i in range(n)), strict=False))) / total - 1.0


def _nothing(row: Any, settings: Any) -> str:
    return ""


LENGTH = Verifier(LengthSettings, _nothing, score_length, lambda settings: [], positive=False)
REPETITION = Verifier(RepetitionSettings, _nothing, score_repetition, lambda settings: [], positive=False)
