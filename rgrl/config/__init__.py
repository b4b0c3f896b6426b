"""The settings of a run. Needs no torch, so that settings can be read and checked anywhere."""

from rgrl.config.load import as_yaml, load_config
from rgrl.config.paths import expanded, located
from rgrl.config.rules import check
from rgrl.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    GradientConfig,
    GuidanceConfig,
    JudgeConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrackingConfig,
    to_dict,
)
from rgrl.errors import REQUEUE, ConfigError, RunStoppedError

__all__ = [
    "REQUEUE",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GradientConfig",
    "GuidanceConfig",
    "JudgeConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "RunStoppedError",
    "TrackingConfig",
    "as_yaml",
    "check",
    "expanded",
    "load_config",
    "located",
    "to_dict",
]
