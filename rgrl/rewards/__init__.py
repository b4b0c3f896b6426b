"""The reward of a completion: a weighted sum of a reward model, verifiers and a user's Python functions.

- `total.py`: the terms, how each is shaped, and their weighted sum
- `classifier.py`: a reward model, its scores, and its gradient with respect to embeddings
- `checkpoint.py`: loading one, and checking that all of it is used
- `template.py`: the input of a reward model
- `bridge.py`: its embeddings in the policy's vocabulary
- `functions.py`: calling a user's function
- `verifiers/`: functions that know the right answer
"""

from rgrl.rewards.checkpoint import load_classifier
from rgrl.rewards.classifier import ClassifierReward, ClassifierScores
from rgrl.rewards.total import RewardCounts, RewardResult, Rewards, load_functions, load_rewards

__all__ = [
    "ClassifierReward",
    "ClassifierScores",
    "RewardCounts",
    "RewardResult",
    "Rewards",
    "load_classifier",
    "load_functions",
    "load_rewards",
]
