"""Every setting of a run, with its unit, default and source. The strings below the fields are the manual.

One YAML file plus dotted overrides (`--optim.learning_rate 1e-4`) make a `Config`. A file may begin from another one
(`extends: rgrl.yaml`, beside it) and say only what differs. A key that does not
exist, a value of the wrong type or a setting that cannot work raises `ConfigError`, whose message is one
line: what is wrong and what would be right.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml


class ConfigError(ValueError):
    """Bad input from the user. Commands print the message on one line and exit with code 2.

    `on_one_rank` says that a single process met it and has to print it, not the main process for all.
    """

    def __init__(self, message: str, on_one_rank: bool = False) -> None:
        super().__init__(message)
        self.on_one_rank = on_one_rank


REQUEUE = 75  # exit code of a run that stopped because it was asked to and can go on (EX_TEMPFAIL of sysexits.h)


class RunStoppedError(Exception):
    """A run that ends before its last step. Commands print the message on one line and exit with `code`."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class ModelConfig:
    path: str = ""
    """Folder or hub id of the diffusion LM, in its authors' checkpoint format. Required."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen base weights. The adapter is always float32."""
    family: Literal["auto", "dream", "llada"] = "auto"
    """Model family; `auto` reads `model_type` from the checkpoint's config.json."""


@dataclass
class LoraConfig:
    r: int = 32
    """Rank. RGRL paper: 32."""
    alpha: float = 32.0
    """Scale; the update is multiplied by alpha / r. RGRL paper: 32."""
    dropout: float = 0.0
    """Probability in 0 ... 1. The paper has 0.1."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of the linear layers to adapt; each must match at least one layer."""


@dataclass
class DataConfig:
    path: str = ""
    """Training prompts: a .jsonl, .json, .csv, .parquet or .txt (one prompt a line) file, a folder written by
    `datasets.save_to_disk`, or a hub id. Required."""
    eval_path: str | None = None
    """Evaluation prompts, same forms. None: no evaluation."""
    split: str = "train"
    """Split of a hub or saved data set."""
    column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages (its first user turn is taken)."""
    max_prompt_length: int = 512
    """Limit in policy tokens, chat markers included; a longer prompt is an error."""
    eval_prompts: int = 64
    """Number of evaluation prompts used (the first ones)."""


@dataclass
class RewardConfig:
    path: str | None = None
    """Folder or hub id of an `AutoModelForSequenceClassification` checkpoint with one label."""
    adapter: str | None = None
    """LoRA adapter of that model, merged when it is loaded."""
    name: str = "model"
    """Its name in `rewards/<name>/mean`."""
    weight: float = 1.0
    """Its weight in the sum of rewards."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of its weights."""
    functions: dict[str, float] = field(default_factory=dict)
    """Plain Python rewards: dotted path `package.module:function` -> weight. Each is called as
    `function(prompts, completions, rows)` and returns one number a completion."""
    time_limit: float = 300.0
    """Seconds that one call of a function may take; then it is interrupted. 0: no limit. What cannot be interrupted
    (native code that never comes back to Python) ends the process 30 seconds later and prints where it hangs."""
    on_error: Literal["stop", "zero"] = "stop"
    """What follows when a function raises or takes too long: `stop` ends the run and names it; `zero` gives all
    completions of the call 0 from it, which moves no advantage, and counts the call in `rewards/<name>/failed`."""
    bridge: Literal["compose", "unknown", "zero"] = "compose"
    """Embedding of a policy token that the reward model's tokenizer lacks: mean of the tokens that spell it,
    the unknown (or end) token, or zero."""
    attend_eos: bool = False
    """Whether the end-of-text token itself is shown to the guide. False agrees with scoring decoded text."""


@dataclass
class JudgeConfig:
    path: str | None = None
    """A second reward model that is only ever used in evaluation. None: no judge."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of its weights."""


@dataclass
class RolloutConfig:
    num_generations: int = 4
    """G, completions per prompt. Paper: 4."""
    max_completion_length: int = 128
    """C, mask tokens appended to each prompt. Paper: 128."""
    steps: int = 128
    """T, denoising steps, 1 ... C. Paper: 128."""
    temperature: float = 0.9
    """Sampling temperature, > 0. Paper: 0.9 in training, 0.7 at test time."""
    top_p: float = 0.95
    """Nucleus: smallest set of tokens with this probability, in (0, 1]. Paper: 0.95."""
    top_k: int = 50
    """Only the k most likely tokens; 0 means all. Paper: 50."""
    confidence: Literal["entropy", "maskgit_plus", "topk_margin", "origin"] = "entropy"
    """Which positions to commit first: lowest entropy, most probable sampled token, widest margin between the two
    best tokens, or at random."""
    confidence_from: Literal["policy", "guided"] = "policy"
    """Whether the confidence reads the policy's own logits or the guided ones. Only `policy` keeps guidance out of the
    order of unmasking, but for `maskgit_plus`, which asks how likely the sampled token is."""
    position_temperature: float = 0.0
    """Temperature of Gumbel noise added to the confidence; 0 is none."""
    micro_batch: int = 0
    """Number of rows that a process denoises at a time, in rollouts and evaluation; 0: all of a rollout's. Fewer need
    less memory and take longer; the rollouts are the same."""
    defer_eos: bool = False
    """Give a sampled end-of-text the lowest confidence, so that it is not committed early."""
    commit_above: float = 1.0
    """Approximation: a step also commits every position whose best token has a probability above this, so that there
    are fewer steps (Fast-dLLM, arXiv 2505.22618). 1 turns it off."""
    block_length: int = 0
    """Approximation: write this many tokens at a time from left to right, reading what stands before them anew only
    when a block begins (Fast-dLLM, arXiv 2505.22618). 0 turns it off."""


@dataclass
class GuidanceConfig:
    kind: Literal["none", "expectation", "aps", "entrgi"] = "entrgi"
    """`none`; `expectation` (soft embeddings); `aps` (straight-through); `entrgi` (blend by entropy)."""
    steps: int = 1
    """M, gradient steps per denoising step. Paper: 1 in training, 3 at test time."""
    eta: float = 0.5
    """Step size on the logits. Paper: 0.5."""
    every: int = 1
    """Approximation: guide only at every k-th denoising step."""
    top_n: int = 0
    """Approximation: guide only the n most likely tokens of each position; 0 means all."""
    support: Literal["guided", "policy"] = "guided"
    """What may be sampled: the top-p/top-k of the steered logits (the paper's way), or that of the policy's own logits,
    weighted by the steered ones. Only with `policy`, or without truncation, can a correction for guidance be exact."""
    share: float = 1.0
    """Share of each group's completions that are guided, 0 ... 1; the others are the policy's own."""
    eta_final: float | None = None
    """Step size at the last step of the run, reached linearly from `eta`. None: constant."""
    probe_prompts: int = 16
    """Number of evaluation prompts that each evaluation also completes with guidance, to tell what it is worth."""
    path: str | None = None
    """A reward model to guide with, where it is not the scorer. None: `reward.path`, whose weights are shared."""


@dataclass
class ObjectiveConfig:
    name: str = "reinforce"
    """`likelihood`, `weighted`, `wd1`, `reinforce`, `grpo`, `spg`, or a dotted path `package.module:attribute`."""
    estimator: str = "one_step"
    """Log-probability estimator: `one_step`, `elbo`, `coupled`, `quadrature`, `sequence_elbo`, `trajectory`,
    `trajectory_sampled`, `block_bounds`, or a dotted path. `rgrl/logprobs.py` says what each one is."""
    draws: int = 2
    """Number of random canvases (`elbo`, `block_bounds`), pairs of them (`coupled`, `sequence_elbo`), quadrature nodes
    (`quadrature`) or steps (`trajectory_sampled`) per estimate."""
    trajectory_steps: int = 1
    """`trajectory`, `trajectory_sampled`: denoising steps that share a canvas; 1 is exact, more is cheaper."""
    block_length: int = 0
    """`block_bounds`: tokens of a block; 0 is the whole completion."""
    upper_power: float = 1.5
    """`block_bounds`: power of the upper bound, at least 1. SPG paper: 1.5."""
    upper_share: float = 0.5
    """`block_bounds`: share of the upper bound where the advantage is not positive, 0 ... 1. SPG paper: 0.5."""
    advantage: str = "zscore"
    """`centred`, `zscore`, `leave_one_out`, `reward_weighted`, `wd1`, or a dotted path."""
    weight_temperature: float = 1.0
    """`reward_weighted`: beta, `wd1`: 1 / psi, in units of the reward."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """What guided tokens count for, c = (probability under the policy) / (under the guided sampler): 1, min(c,
    correction_max), or c where correction_min <= c <= correction_max and else 0."""
    correction_level: Literal["token", "sequence"] = "token"
    """Whether c is of one token, or the product over a completion."""
    correction_min: float = 0.5
    """Lower end of the band of `mask`."""
    correction_max: float = 2.0
    """Upper end; `.inf` with `truncate` is the full correction."""
    beta: float = 0.0
    """Weight of the k3 estimate of KL(policy || frozen base), per token."""
    level: Literal["token", "sequence"] = "token"
    """`grpo`: whether the ratio and its clipping are per token or of a completion's mean token (GSPO)."""
    epsilon_low: float = 0.2
    """`grpo`: the ratio is clipped below 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """`grpo`: the ratio is clipped above 1 + epsilon_high."""
    iterations: int = 1
    """Optimizer updates per rollout."""
    prompt_mask: float = 0.3
    """Probability with which `one_step` hides each prompt token. Paper: 0.3."""


@dataclass
class OptimConfig:
    learning_rate: float = 5e-6
    """Peak learning rate of AdamW. Paper: 5e-6 at 7B."""
    warmup_steps: int = 0
    """Number of optimizer updates over which the rate rises to its peak in equal steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: the peak, or a fall that would come to 0 just after the last update."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass
class RunConfig:
    output_dir: str = ""
    """Where everything is written. Must not hold a run already, unless it is resumed. Required."""
    seed: int = 0
    """Seed of everything random."""
    steps: int = 500
    """Number of RGRL steps (one rollout each)."""
    save_steps: int = 100
    """Number of steps between checkpoints; the last step is always saved. 0: only the last."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints kept."""
    eval_steps: int = 100
    """Number of steps between evaluations, which also run before the first and after the last. 0: never."""
    prompts_per_device: int = 2
    """P, prompts each process rolls out per step; rows per process are P times num_generations. Paper: 2."""
    gradient_accumulation_steps: int = 1
    """Number of micro-batches into which a process splits its rows for the update; must divide them."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    empty_cache: Literal["never", "step", "phase"] = "never"
    """When memory that torch keeps for reuse is given back to the GPU: never, after each step, or also between
    rollout and update, whose tensors have different shapes, so that what one leaves may be of no use to the other."""
    resume_from_checkpoint: str | None = None
    """`latest`: the newest whole checkpoint of `output_dir`; `auto`: the same, or a fresh start where there is none
    yet (for jobs that are queued again); or the path of a checkpoint folder."""
    max_hours: float = 0.0
    """Hours of wall clock after which the run saves and exits with code 75, as it does on SIGTERM and SIGUSR1: at the
    end of the rollout or of the update that it is in. 0: no limit."""
    timeout_minutes: float = 30.0
    """Minutes that a process waits for the others before it gives the run up."""
    max_skipped: int = 10
    """Number of updates in a row skipped for a loss or gradient that is not finite, after which the run stops. The
    batch of each is written to `skipped/`."""
    on_write_error: Literal["stop", "continue"] = "stop"
    """What follows when a checkpoint, a line of metrics or a table cannot be written, such as on a full disk: `stop`
    ends the run; `continue` says so and tries again after the next step, but for a table, which is lost. Older
    checkpoints stay whole either way."""


@dataclass
class TrackingConfig:
    wandb: bool = True
    """Log to Weights & Biases too. Its own settings (WANDB_MODE ...) decide how; offline without an account."""
    project: str = "rgrl"
    """W&B project."""
    name: str | None = None
    """W&B run name. None: the output folder's name."""
    completions_steps: int = 10
    """Number of steps between tables of rollouts; the last step always leaves one. 0: only that one. Evaluations leave
    theirs each time."""


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The file at `path` with `overrides` (["--a.b", "value", "--c.d=value", ...]) laid over it, checked.

    Raises `ConfigError`.
    """
    tree = _read(Path(path))
    for key, value in _parse_overrides(overrides or []):
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--{key}: `{parent}` is a value, not a section")
        node[last] = value
    config = _build(Config, tree, "")
    check(config)
    return config


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in a file, laid over those of the file that its key `extends` names."""
    if not path.is_file():
        by = f" (which {below[-1]} extends)" if below else ""
        raise ConfigError(f"--config {path}{by}: no such file")
    if path.resolve() in below:
        raise ConfigError(f"{path} extends itself, by way of {' and '.join(map(str, below))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as `model:` and `run:`, not a {type(tree).__name__}")
    parent = tree.pop("extends", None)
    return tree if parent is None else _overlay(_read(path.parent / str(parent), (*below, path.resolve())), tree)


def _overlay(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with `changes`, section by section."""
    return tree | {
        key: _overlay(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        for key, value in changes.items()
    }


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _parse_overrides(words: list[str]) -> list[tuple[str, Any]]:
    pairs, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"expected --section.key value, got {word!r}")
        key, given, text = word[2:].partition("=")
        if not given:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            text = queue.pop(0)
        try:
            pairs.append((key, yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: cannot read the value {text!r}") from error
    return pairs


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"`{prefix[:-1]}` is a section with keys of its own, not the value {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            known = [prefix + name for name in hints]
            near = difflib.get_close_matches(f"{prefix}{key}", known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key `{prefix}{key}`; did you mean `{near}`?")
        kind = hints[key]
        is_section = dataclasses.is_dataclass(kind)
        values[key] = _build(kind, value, f"{prefix}{key}.") if is_section else _coerce(kind, value, f"{prefix}{key}")
    return cls(**values)


def _coerce(kind: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _coerce(next(a for a in args if a is not type(None)), value, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"`{key}` must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin is list and isinstance(value, list):
        return [_coerce(args[0], item, key) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(k): _coerce(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    expected = origin or kind
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ConfigError(f"`{key}` must be {_name(expected)}, not {value!r}")
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"`{key}` must be a number, not {value!r}")
    return value


def _name(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
    return names.get(kind, "a mapping")


def check(c: Config) -> None:
    """Refuse what cannot work, as far as the settings alone tell. Raises `ConfigError`."""
    r, o, g = c.rollout, c.objective, c.guidance
    rows = c.run.prompts_per_device * r.num_generations
    rules: list[tuple[bool, str]] = [
        (bool(c.model.path), "`model.path` is required: the folder or hub id of a diffusion LM"),
        (bool(c.data.path), "`data.path` is required: a file of prompts"),
        (bool(c.run.output_dir), "`run.output_dir` is required: a folder for the results"),
        (bool(c.reward.path or c.reward.functions), "a reward is required: set `reward.path` or `reward.functions`"),
        (c.lora.r >= 1, f"`lora.r` must be at least 1, not {c.lora.r}"),
        (c.lora.alpha > 0, f"`lora.alpha` must be above 0, not {c.lora.alpha}"),
        (0 <= c.lora.dropout < 1, f"`lora.dropout` must be in [0, 1), not {c.lora.dropout}"),
        (bool(c.lora.targets), "`lora.targets` is empty: name at least one layer"),
        (c.data.max_prompt_length >= 1, f"`data.max_prompt_length` must be at least 1, not {c.data.max_prompt_length}"),
        (c.data.eval_prompts >= 1, f"`data.eval_prompts` must be at least 1, not {c.data.eval_prompts}"),
        (r.num_generations >= 1, f"`rollout.num_generations` must be at least 1, not {r.num_generations}"),
        (
            r.max_completion_length >= 1,
            f"`rollout.max_completion_length` must be at least 1, not {r.max_completion_length}",
        ),
        (r.steps >= 1, f"`rollout.steps` must be at least 1, not {r.steps}"),
        (
            r.steps <= r.max_completion_length,
            f"`rollout.steps` ({r.steps}) is more than `rollout.max_completion_length` ({r.max_completion_length}): "
            "there would be steps with nothing to commit",
        ),
        (0 < r.temperature < math.inf, f"`rollout.temperature` must be above 0 and finite, not {r.temperature}"),
        (0 < r.top_p <= 1, f"`rollout.top_p` must be in (0, 1], not {r.top_p}"),
        (r.top_k >= 0, f"`rollout.top_k` must be 0 (all) or more, not {r.top_k}"),
        (r.micro_batch >= 0, f"`rollout.micro_batch` must be 0 (all rows) or more, not {r.micro_batch}"),
        (r.position_temperature >= 0, f"`rollout.position_temperature` must not be negative: {r.position_temperature}"),
        (0 < r.commit_above <= 1, f"`rollout.commit_above` must be in (0, 1], not {r.commit_above}"),
        (
            c.guidance.steps >= 1,
            f"`guidance.steps` must be at least 1, not {c.guidance.steps} (`guidance.kind: none` turns it off)",
        ),
        (c.guidance.every >= 1, f"`guidance.every` must be at least 1, not {c.guidance.every}"),
        (
            c.guidance.top_n == 0 or c.guidance.top_n >= 2,
            f"`guidance.top_n` must be 0 (all) or at least 2, not {c.guidance.top_n}",
        ),
        (0 <= g.share <= 1, f"`guidance.share` must be in 0 ... 1, not {g.share}"),
        (
            g.eta_final is None or 0 <= g.eta_final < math.inf,
            f"`guidance.eta_final` must be finite and not negative: {g.eta_final}",
        ),
        (g.probe_prompts >= 0, f"`guidance.probe_prompts` must not be negative: {g.probe_prompts}"),
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
        (0 < c.guidance.eta < math.inf, f"`guidance.eta` must be above 0 and finite, not {c.guidance.eta}"),
        (
            c.guidance.kind == "none" or bool(c.reward.path or c.guidance.path),
            f"`guidance.kind: {c.guidance.kind}` needs a reward with a gradient: set `reward.path` or `guidance.path`; "
            "Python functions have none",
        ),
        (
            o.name == "likelihood" or r.num_generations >= 2,
            f"`objective.advantage: {o.advantage}` compares completions within a group: "
            "`rollout.num_generations` must be at least 2",
        ),
        (o.draws >= 1, f"`objective.draws` must be at least 1, not {o.draws}"),
        (o.trajectory_steps >= 1, f"`objective.trajectory_steps` must be at least 1, not {o.trajectory_steps}"),
        (o.block_length >= 0, f"`objective.block_length` must be 0 (all) or more, not {o.block_length}"),
        (o.upper_power >= 1, f"`objective.upper_power` must be at least 1, not {o.upper_power}"),
        (0 <= o.upper_share <= 1, f"`objective.upper_share` must be in 0 ... 1, not {o.upper_share}"),
        (
            0 < o.weight_temperature < math.inf,
            f"`objective.weight_temperature` must be above 0 and finite, not {o.weight_temperature}",
        ),
        (
            0 <= o.correction_min <= o.correction_max and o.correction_max > 0,
            f"`objective.correction_min` ({o.correction_min}) and `objective.correction_max` ({o.correction_max}) must "
            "be a band of positive numbers",
        ),
        (
            o.correction == "none" or o.level == "token" or o.correction_level == "sequence",
            "`objective.level: sequence` needs `objective.correction_level: sequence`",
        ),
        (
            {"weighted": "reward_weighted", "wd1": "wd1"}.get(o.name, o.advantage) == o.advantage or ":" in o.advantage,
            f"`objective.name: {o.name}` does not go with `objective.advantage: {o.advantage}`: `weighted` takes "
            "`reward_weighted` and `wd1` takes `wd1`",
        ),
        (o.beta >= 0, f"`objective.beta` must not be negative: {o.beta}"),
        (0 <= o.epsilon_low < 1, f"`objective.epsilon_low` must be in [0, 1), not {o.epsilon_low}"),
        (o.epsilon_high >= 0, f"`objective.epsilon_high` must not be negative: {o.epsilon_high}"),
        (o.iterations >= 1, f"`objective.iterations` must be at least 1, not {o.iterations}"),
        (0 <= o.prompt_mask < 1, f"`objective.prompt_mask` must be in [0, 1), not {o.prompt_mask}"),
        (
            0 < c.optim.learning_rate < math.inf,
            f"`optim.learning_rate` must be above 0 and finite, not {c.optim.learning_rate}",
        ),
        (c.optim.warmup_steps >= 0, f"`optim.warmup_steps` must not be negative: {c.optim.warmup_steps}"),
        (c.optim.weight_decay >= 0, f"`optim.weight_decay` must not be negative: {c.optim.weight_decay}"),
        (c.optim.max_grad_norm > 0, f"`optim.max_grad_norm` must be above 0, not {c.optim.max_grad_norm}"),
        (c.run.steps >= 1, f"`run.steps` must be at least 1, not {c.run.steps}"),
        (c.run.save_steps >= 0, f"`run.save_steps` must not be negative: {c.run.save_steps}"),
        (c.run.eval_steps >= 0, f"`run.eval_steps` must not be negative: {c.run.eval_steps}"),
        (c.run.keep_checkpoints >= 1, f"`run.keep_checkpoints` must be at least 1, not {c.run.keep_checkpoints}"),
        (c.run.max_hours >= 0, f"`run.max_hours` must be 0 (no limit) or more, not {c.run.max_hours}"),
        (
            0 < c.run.timeout_minutes < math.inf,
            f"`run.timeout_minutes` must be above 0 and finite, not {c.run.timeout_minutes}",
        ),
        (c.run.max_skipped >= 1, f"`run.max_skipped` must be at least 1, not {c.run.max_skipped}"),
        (
            0 <= c.reward.time_limit < math.inf,
            f"`reward.time_limit` must be 0 (no limit) or more and finite, not {c.reward.time_limit}",
        ),
        (c.run.prompts_per_device >= 1, f"`run.prompts_per_device` must be at least 1, not {c.run.prompts_per_device}"),
        (
            c.run.gradient_accumulation_steps >= 1 and rows % c.run.gradient_accumulation_steps == 0,
            f"`run.gradient_accumulation_steps` ({c.run.gradient_accumulation_steps}) must divide the "
            f"{rows} rows of a process (prompts_per_device x num_generations)",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)
