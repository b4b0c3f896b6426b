"""What is learned from a scored rollout: advantages, estimators, objectives, corrections. Plain torch."""

from rgrl.algo.registry import Algorithm, resolve_algorithm

__all__ = ["Algorithm", "resolve_algorithm"]
