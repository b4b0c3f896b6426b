"""Verifiers: rewards that know the right answer, by short names in `reward.functions` (docs/verifiers.md).

None of them ever evaluates text as code.
"""

from collections.abc import Mapping
from typing import Any

from rgrl.errors import ConfigError
from rgrl.rewards.verifiers.base import Verification, Verifier, checked
from rgrl.rewards.verifiers.countdown import COUNTDOWN
from rgrl.rewards.verifiers.latex import MATH
from rgrl.rewards.verifiers.numbers import NUMERIC
from rgrl.rewards.verifiers.penalties import LENGTH, REPETITION
from rgrl.rewards.verifiers.sudoku import SUDOKU
from rgrl.rewards.verifiers.texts import EXACT, PATTERN, TAGS

VERIFIERS: dict[str, Verifier] = {
    "numeric": NUMERIC,
    "exact": EXACT,
    "math": MATH,
    "countdown": COUNTDOWN,
    "sudoku": SUDOKU,
    "tags": TAGS,
    "pattern": PATTERN,
    "length": LENGTH,
    "repetition": REPETITION,
}

__all__ = ["VERIFIERS", "Verification", "load_verifier"]


def load_verifier(
    kind: str, name: str | None = None, settings: Mapping[str, Any] | None = None, seconds: float | None = None
) -> Verification:
    """A verifier by its short name, to be called as `verifier(prompts, completions, rows)`. Raises `ConfigError`.

    `seconds`: time limit of one completion, for those that have a process of their own.
    """
    verifier = VERIFIERS[kind]
    own = checked(verifier.settings, settings or {}, kind)
    limit = verifier.seconds if seconds is None else seconds
    if verifier.seconds and not limit > 0:
        raise ConfigError(f"the time limit of the verifier `{kind}` must be above 0 seconds, not {limit:g}")
    return Verification(name or kind, verifier, own, limit)
