"""What the settings alone can rule out, section by section. What an objective combines with is in `rgrl.algo`."""

import math

from rgrl.config.schema import Config
from rgrl.errors import ConfigError

Rules = list[tuple[bool, str]]  # (whether it holds, what to say if it does not)


def check(c: Config) -> None:
    """Refuse settings that cannot work, as far as they alone tell. Raises `ConfigError` for the first."""
    for section in (_required, _model, _data, _rollout, _guidance, _objective, _optim, _run):
        for holds, message in section(c):
            if not holds:
                raise ConfigError(message)


def _required(c: Config) -> Rules:
    return [
        (bool(c.model.path), "`model.path` is required: the folder or hub id of a diffusion LM"),
        (bool(c.data.path), "`data.path` is required: a file of prompts"),
        (bool(c.run.output_dir), "`run.output_dir` is required: a folder for the results"),
        (bool(c.reward.path or c.reward.functions), "a reward is required: set `reward.path` or `reward.functions`"),
    ]


def _model(c: Config) -> Rules:
    return [
        _at_least("lora.r", c.lora.r, 1),
        (c.lora.alpha > 0, f"`lora.alpha` must be above 0, not {c.lora.alpha}"),
        (0 <= c.lora.dropout < 1, f"`lora.dropout` must be in [0, 1), not {c.lora.dropout}"),
        (bool(c.lora.targets), "`lora.targets` is empty: name at least one layer"),
    ]


def _data(c: Config) -> Rules:
    return [
        _at_least("data.max_prompt_length", c.data.max_prompt_length, 1),
        _at_least("data.eval_prompts", c.data.eval_prompts, 1),
        (
            0 <= c.reward.time_limit < math.inf,
            f"`reward.time_limit` must be 0 (no limit) or more and finite, not {c.reward.time_limit}",
        ),
    ]


def _rollout(c: Config) -> Rules:
    r = c.rollout
    return [
        _at_least("rollout.num_generations", r.num_generations, 1),
        _at_least("rollout.max_completion_length", r.max_completion_length, 1),
        _at_least("rollout.steps", r.steps, 1),
        (
            r.steps <= r.max_completion_length,
            f"`rollout.steps` ({r.steps}) is more than `rollout.max_completion_length` ({r.max_completion_length}): "
            "there would be steps with nothing to commit",
        ),
        _positive("rollout.temperature", r.temperature),
        (0 < r.top_p <= 1, f"`rollout.top_p` must be in (0, 1], not {r.top_p}"),
        (r.top_k >= 0, f"`rollout.top_k` must be 0 (all) or more, not {r.top_k}"),
        (r.micro_batch >= 0, f"`rollout.micro_batch` must be 0 (all rows) or more, not {r.micro_batch}"),
        _not_negative("rollout.position_temperature", r.position_temperature),
        (0 < r.commit_above <= 1, f"`rollout.commit_above` must be in (0, 1], not {r.commit_above}"),
        (
            r.block_length == 0 or (r.block_length > 0 and r.max_completion_length % r.block_length == 0),
            f"`rollout.block_length` ({r.block_length}) must be 0 or divide `rollout.max_completion_length` "
            f"({r.max_completion_length})",
        ),
        (
            r.block_length <= 0 or r.steps * r.block_length >= r.max_completion_length,
            f"`rollout.steps` ({r.steps}) must be at least one for each block of `rollout.block_length` "
            f"({r.block_length}) tokens",
        ),
    ]


def _guidance(c: Config) -> Rules:
    g = c.guidance
    return [
        (g.steps >= 1, f"`guidance.steps` must be at least 1, not {g.steps} (`guidance.kind: none` turns it off)"),
        _at_least("guidance.every", g.every, 1),
        (g.top_n == 0 or g.top_n >= 2, f"`guidance.top_n` must be 0 (all) or at least 2, not {g.top_n}"),
        (0 <= g.share <= 1, f"`guidance.share` must be in 0 ... 1, not {g.share}"),
        (
            g.eta_final is None or 0 <= g.eta_final < math.inf,
            f"`guidance.eta_final` must be finite and not negative: {g.eta_final}",
        ),
        _not_negative("guidance.probe_prompts", g.probe_prompts),
        _positive("guidance.eta", g.eta),
        (
            g.kind == "none" or bool(c.reward.path or g.path),
            f"`guidance.kind: {g.kind}` needs a reward with a gradient: set `reward.path` or `guidance.path`; "
            "Python functions have none",
        ),
    ]


def _objective(c: Config) -> Rules:
    o = c.objective
    return [
        _at_least("objective.draws", o.draws, 1),
        _at_least("objective.trajectory_steps", o.trajectory_steps, 1),
        (o.block_length >= 0, f"`objective.block_length` must be 0 (all) or more, not {o.block_length}"),
        _at_least("objective.upper_power", o.upper_power, 1),
        (0 <= o.upper_share <= 1, f"`objective.upper_share` must be in 0 ... 1, not {o.upper_share}"),
        _positive("objective.weight_temperature", o.weight_temperature),
        (
            0 <= o.correction_min <= o.correction_max and o.correction_max > 0,
            f"`objective.correction_min` ({o.correction_min}) and `objective.correction_max` ({o.correction_max}) must "
            "be a band of positive numbers",
        ),
        _not_negative("objective.beta", o.beta),
        (0 <= o.epsilon_low < 1, f"`objective.epsilon_low` must be in [0, 1), not {o.epsilon_low}"),
        _not_negative("objective.epsilon_high", o.epsilon_high),
        _at_least("objective.iterations", o.iterations, 1),
        (0 <= o.prompt_mask < 1, f"`objective.prompt_mask` must be in [0, 1), not {o.prompt_mask}"),
    ]


def _optim(c: Config) -> Rules:
    o = c.optim
    return [
        _positive("optim.learning_rate", o.learning_rate),
        _not_negative("optim.warmup_steps", o.warmup_steps),
        _not_negative("optim.weight_decay", o.weight_decay),
        (o.max_grad_norm > 0, f"`optim.max_grad_norm` must be above 0, not {o.max_grad_norm}"),
    ]


def _run(c: Config) -> Rules:
    r, rows = c.run, c.run.prompts_per_device * c.rollout.num_generations
    return [
        _at_least("run.steps", r.steps, 1),
        _not_negative("run.save_steps", r.save_steps),
        _not_negative("run.eval_steps", r.eval_steps),
        _at_least("run.keep_checkpoints", r.keep_checkpoints, 1),
        (r.max_hours >= 0, f"`run.max_hours` must be 0 (no limit) or more, not {r.max_hours}"),
        _positive("run.timeout_minutes", r.timeout_minutes),
        _at_least("run.max_skipped", r.max_skipped, 1),
        _at_least("run.prompts_per_device", r.prompts_per_device, 1),
        (
            r.gradient_accumulation_steps >= 1 and rows % r.gradient_accumulation_steps == 0,
            f"`run.gradient_accumulation_steps` ({r.gradient_accumulation_steps}) must divide the "
            f"{rows} rows of a process (prompts_per_device x num_generations)",
        ),
    ]


def _at_least(key: str, value: float, least: int) -> tuple[bool, str]:
    return value >= least, f"`{key}` must be at least {least}, not {value}"


def _not_negative(key: str, value: float) -> tuple[bool, str]:
    return value >= 0, f"`{key}` must not be negative: {value}"


def _positive(key: str, value: float) -> tuple[bool, str]:
    return 0 < value < math.inf, f"`{key}` must be above 0 and finite, not {value}"
