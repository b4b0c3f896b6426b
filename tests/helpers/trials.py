"""Whether a reward or an objective of a test is called in the trial at set-up, and not in a run."""

from rgrl.rewards.total import TRIAL
from rgrl.types import LossInputs


def scored(completions: list[str]) -> bool:
    """Whether these are the completions that every reward is tried on."""
    return completions == list(TRIAL)


def updated(inputs: LossInputs) -> bool:
    """Whether these are the inputs that every objective of a user's own is tried on (`rgrl.step.made_up`)."""
    return inputs.advantage_B.tolist() == [1.0, -1.0]
