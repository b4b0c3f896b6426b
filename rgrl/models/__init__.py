from rgrl.models.lora import add_lora
from rgrl.models.policy import Policy, load_policy

__all__ = ["Policy", "add_lora", "load_policy"]
