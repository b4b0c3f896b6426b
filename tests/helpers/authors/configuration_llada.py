"""A config class as a LLaDA checkpoint brings along: what config.json says becomes attributes."""

from transformers import PreTrainedConfig


class LLaDAConfig(PreTrainedConfig):
    model_type = "llada"
