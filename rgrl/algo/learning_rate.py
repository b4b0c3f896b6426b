"""The learning rate as a function of the update's number, so that resuming needs no schedule state."""

import math

from rgrl.config import Config


def learning_rate(config: Config, update: int) -> float:
    """The rate of an update, counted from 0 over the whole run: linear warm-up, then the schedule down to 0."""
    o, updates = config.optim, config.run.steps * config.objective.iterations
    if update < o.warmup_steps:
        return o.learning_rate * (update + 1) / o.warmup_steps
    done = (update - o.warmup_steps) / max(1, updates - o.warmup_steps)
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return o.learning_rate * factors[o.schedule]
