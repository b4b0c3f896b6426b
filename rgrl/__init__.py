"""rgrl: reward-guided reinforcement learning for masked diffusion language models."""

__version__ = "0.1.0"
