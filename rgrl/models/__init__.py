"""The diffusion LM behind one contract, with its LoRA adapter. Callers never see a family."""

from rgrl.models.load import load_policy
from rgrl.models.lora import add_lora
from rgrl.models.policy import Policy

__all__ = ["Policy", "add_lora", "load_policy"]
