"""rgrl: reward-guided reinforcement learning for masked diffusion language models.

The Python API, loaded when it is first used:

    config = rgrl.load_config("recipes/reviews/rgrl.yaml", ["--run.steps", "10"])
    folder = rgrl.train(config)                   # what `rgrl train` does
    metrics = rgrl.evaluate(config).metrics

    policy = rgrl.load_policy("recipes/reviews/policy")
    reward = rgrl.load_classifier("recipes/reviews/reward").bind(policy.tokenizer, policy.vocab_size, "compose")
    prompts = ["the plot of this film"] * 4
    guidance = reward.guidance(rgrl.GuidanceConfig(steps=3))
    rollout = rgrl.generate(policy, prompts, rgrl.RolloutConfig(max_completion_length=20, steps=20), guidance=guidance)
    texts = policy.decode(rollout.completion_BC)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rgrl.config import Config, GuidanceConfig, ModelConfig, RolloutConfig, load_config
    from rgrl.errors import ConfigError, RunStoppedError
    from rgrl.models import load_policy
    from rgrl.rewards import load_classifier
    from rgrl.rollout import Guidance, generate
    from rgrl.trainer import evaluate, train
    from rgrl.types import Prompts

__version__ = "0.2.0.dev0"

_HOME = {
    "Config": "rgrl.config",
    "GuidanceConfig": "rgrl.config",
    "ModelConfig": "rgrl.config",
    "RolloutConfig": "rgrl.config",
    "load_config": "rgrl.config",
    "ConfigError": "rgrl.errors",
    "RunStoppedError": "rgrl.errors",
    "load_policy": "rgrl.models",
    "load_classifier": "rgrl.rewards",
    "Guidance": "rgrl.rollout",
    "generate": "rgrl.rollout",
    "evaluate": "rgrl.trainer",
    "train": "rgrl.trainer",
    "Prompts": "rgrl.types",
}
__all__ = [
    "Config",
    "ConfigError",
    "Guidance",
    "GuidanceConfig",
    "ModelConfig",
    "Prompts",
    "RolloutConfig",
    "RunStoppedError",
    "evaluate",
    "generate",
    "load_classifier",
    "load_config",
    "load_policy",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that `import rgrl` and `rgrl.config` stay fast."""
    if name not in _HOME:
        raise AttributeError(f"module 'rgrl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
