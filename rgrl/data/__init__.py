"""Prompts: reading them, what of them is kept, and which of them a step sees."""

from rgrl.data.fingerprint import fingerprint
from rgrl.data.lengths import fit, fit_both
from rgrl.data.prompts import PromptSet, Tally, load_data, load_prompts
from rgrl.data.stream import PromptStream

__all__ = ["PromptSet", "PromptStream", "Tally", "fingerprint", "fit", "fit_both", "load_data", "load_prompts"]
