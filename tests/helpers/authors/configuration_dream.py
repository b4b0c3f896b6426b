"""A config class as a Dream checkpoint brings along: what config.json says becomes attributes."""

from transformers import PreTrainedConfig


class DreamConfig(PreTrainedConfig):
    model_type = "Dream"
