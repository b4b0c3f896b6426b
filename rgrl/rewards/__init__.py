"""What text is worth, by models and by a user's own functions."""

from rgrl.rewards.classifier import ClassifierReward, load_classifier
from rgrl.rewards.total import Rewards, load_functions, load_rewards

__all__ = ["ClassifierReward", "Rewards", "load_classifier", "load_functions", "load_rewards"]
