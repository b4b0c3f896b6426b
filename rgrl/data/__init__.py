"""Prompts: reading them, and which of them a step sees."""

from rgrl.data.fingerprint import fingerprint
from rgrl.data.sources import load_prompts
from rgrl.data.stream import PromptStream

__all__ = ["PromptStream", "fingerprint", "load_prompts"]
