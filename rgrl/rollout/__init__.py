"""How text is made: unmasking a canvas, and steering it with the gradient of a reward. Plain torch."""

from rgrl.rollout.generate import generate
from rgrl.rollout.guidance import Guidance

__all__ = ["Guidance", "generate"]
