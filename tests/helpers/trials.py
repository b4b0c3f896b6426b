"""Whether a reward or an objective of a test is called in the dry run at set-up, and not in a run."""

from rgrl.rewards.total import TRIAL
from rgrl.types import LossInputs


def scored(completions: list[str]) -> bool:
    """Whether these are the completions of the dry run of rewards."""
    return completions == list(TRIAL)


def updated(inputs: LossInputs) -> bool:
    """Whether these are the inputs of the dry run of objectives (`rgrl.trial.dummy_rollout`)."""
    return inputs.advantage_B.tolist() == [1.0, -1.0]
