"""What settings of several sections rule out together. What an objective combines with is in `rgrl.algo`."""

from rgrl.config.schema import Config, to_dict
from rgrl.errors import ConfigError

MOST_ROWS = 2**16  # of one process; more is a slip, and no memory would hold them


def check(c: Config) -> None:
    """Refuse settings that cannot work, as far as they alone tell. Raises `ConfigError` for the first.

    Sections check themselves when they are made; they are checked again, as they may have been changed since.
    """
    if to_dict(Config(**to_dict(c))) != to_dict(c):
        raise ConfigError("a setting was changed to a value of another type than its own")
    rows = c.run.prompts_per_device * c.rollout.num_generations
    rules = [
        (bool(c.model.path), "`model.path` is required: the folder or hub id of a diffusion LM"),
        (bool(c.data.path or c.data.generate), "`data.path` is required: a file of prompts (or `data.generate`)"),
        (bool(c.run.output_dir), "`run.output_dir` is required: a folder for the results"),
        (bool(c.reward.path or c.reward.functions), "a reward is required: set `reward.path` or `reward.functions`"),
        (
            c.guidance.kind == "none" or bool(c.reward.path or c.guidance.path),
            f"`guidance.kind: {c.guidance.kind}` needs a reward with a gradient: set `reward.path` or `guidance.path`; "
            "Python functions have none",
        ),
        (
            c.objective.weight > 0 or c.gradient.weight > 0,
            "nothing to learn from: `objective.weight` and `gradient.weight` are both 0",
        ),
        (
            c.gradient.weight == 0 or c.gradient.of == "guide" or bool(c.reward.path and c.reward.weight),
            f"`gradient.weight: {c.gradient.weight}` needs a reward with a gradient: set `reward.path` (with a "
            "`reward.weight` other than 0), or `gradient.of: guide`; Python functions have none",
        ),
        (
            c.gradient.weight == 0 or c.gradient.of == "reward" or bool(c.reward.path or c.guidance.path),
            "`gradient.of: guide` needs a model with a gradient: set `reward.path` or `guidance.path`",
        ),
        (
            c.rollout.temperature > 0,
            "`rollout.temperature` must be above 0, not 0: training samples; `eval.temperature: 0` evaluates greedily",
        ),
        (
            not (c.eval.temperature == 0 and c.eval.samples > 1 and c.rollout.confidence != "origin")
            or c.rollout.position_temperature > 0,
            f"`eval.samples` ({c.eval.samples}) must be 1 with `eval.temperature: 0`, which writes the same completion "
            "every time",
        ),
        (
            c.rollout.num_generations > 1
            or not any(getattr(part, "normalise", False) for part in (c.reward, *c.reward.functions.values())),
            "`normalise` compares the completions of a group: set `rollout.num_generations` to at least 2",
        ),
        (
            rows <= MOST_ROWS,
            f"{rows:,} rows a process (`run.prompts_per_device` x `rollout.num_generations`) are more than the "
            f"{MOST_ROWS:,} that a step can have",
        ),
        (
            rows % c.run.gradient_accumulation_steps == 0,
            f"`run.gradient_accumulation_steps` ({c.run.gradient_accumulation_steps}) must divide the "
            f"{rows} rows of a process (prompts_per_device x num_generations)",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)
