"""What text is worth, by models and by a user's own functions."""

from rgrl.rewards.classifier import ClassifierReward, PromptedReward, load_classifier
from rgrl.rewards.total import Rewards, load_rewards

__all__ = ["ClassifierReward", "PromptedReward", "Rewards", "load_classifier", "load_rewards"]
