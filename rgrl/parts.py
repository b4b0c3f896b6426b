"""What a run is made of, loaded and checked before any long work: the processes, the models, the data."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from rgrl.advantages import ADVANTAGES
from rgrl.config import Config, ConfigError
from rgrl.data import PromptStream, load_prompts
from rgrl.launch import check_launch, shard_size
from rgrl.logprobs import ESTIMATORS, Estimator
from rgrl.models import Policy, add_lora, load_policy
from rgrl.models.lora import adapter_parameters, check_gradients
from rgrl.objectives import OBJECTIVES, Objective
from rgrl.rewards import ClassifierReward, Rewards, load_classifier, load_rewards, resolve
from rgrl.seeds import seed_globals
from rgrl.types import Prompts


@dataclass
class Parts:
    """Everything a run is made of, loaded and checked before any long work."""

    config: Config
    accelerator: Accelerator
    policy: Policy
    rewards: Rewards
    guide: ClassifierReward | None
    judge: ClassifierReward | None
    stream: PromptStream
    eval_prompts: Prompts | None
    optimizer: torch.optim.Optimizer


def join_processes(config: Config) -> Accelerator:
    """This process joined with the others that were started with it, by gloo where there is no GPU.

    Raises `ConfigError` for a launch that cannot work, such as processes that would not know of each other: each would
    be a main process writing to the same folder.
    """
    check_launch(os.environ)
    # Groups come to be behind a barrier with a time limit: NCCL has none where a process dies before their first use.
    os.environ.setdefault("TORCH_DIST_INIT_BARRIER", "1")
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=config.run.timeout_minutes))
    # Accelerate's launcher starts several CPU processes only as if they were for GPUs, and doesn't tell them.
    on_cpus = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpus, kwargs_handlers=[patience])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started but Accelerate joined {accelerator.num_processes}: without GPUs, set "
            "ACCELERATE_USE_CPU=true"
        )
    return accelerator


def set_up(config: Config, accelerator: Accelerator) -> Parts:
    """Load every part and check what only the parts together can tell. Raises `ConfigError`."""
    device = accelerator.device
    # Nothing here reads the global generators, but a user's own reward or objective may.
    seed_globals(config.run.seed, 0, accelerator.process_index)
    check_objective(config)
    prompts = load_prompts(config.data.path, config.data)
    eval_prompts = None
    if config.data.eval_path is not None and config.run.eval_steps:
        every = load_prompts(config.data.eval_path, config.data)
        n = config.data.eval_prompts
        eval_prompts = Prompts(every.texts[:n], every.rows[:n])
    size = shard_size(os.environ, accelerator.num_processes)
    policy = load_policy(config.model, device if size == 1 else "cpu")  # a GPU may not hold it whole
    texts = prompts.texts + (eval_prompts.texts if eval_prompts is not None else [])
    longest = policy.encode_prompts(texts, config.data.max_prompt_length)[0].shape[1]
    if longest + config.rollout.max_completion_length > policy.max_length:
        raise ConfigError(
            f"`rollout.max_completion_length` {config.rollout.max_completion_length} after a prompt of {longest} "
            f"tokens is beyond the model's {policy.max_length} positions"
        )
    rewards, guide = load_rewards(config, device)
    if guide is not None:
        guide.bind(policy.tokenizer, policy.vocab_size, config.reward.bridge)
    judge = load_classifier(config.judge.path, device, config.judge.dtype, name="judge") if config.judge.path else None
    add_lora(policy, config.lora, config.run.seed).eval()
    if size > 1:
        accelerator.wait_for_everyone()  # with the time limit; who could not load something is missed here
        policy.shard(device, size, timedelta(minutes=config.run.timeout_minutes))
    check_gradients(policy)
    if config.run.gradient_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(adapter_parameters(policy).values())
    o = config.optim
    optimizer = torch.optim.AdamW(parameters, lr=o.learning_rate, weight_decay=o.weight_decay)
    stream = PromptStream(prompts, config.run.seed, config.run.prompts_per_device, accelerator.num_processes)
    return Parts(config, accelerator, policy, rewards, guide, judge, stream, eval_prompts, optimizer)


def check_objective(config: Config) -> None:
    """Refuse an objective, an estimator and an advantage that don't exist or don't go together."""
    o, found = config.objective, {}
    for what, name, known, kind in (
        ("objective", o.name, OBJECTIVES, Objective),
        ("estimator", o.estimator, ESTIMATORS, Estimator),
        ("advantage", o.advantage, ADVANTAGES, Callable),
    ):
        found[what] = resolve(name, what, known)
        if not isinstance(found[what], kind):
            raise ConfigError(f"{what} {name!r} is not of the type {kind.__name__}")
    objective, estimator = found["objective"], found["estimator"]
    if objective.estimators and o.estimator not in objective.estimators:
        raise ConfigError(
            f"`objective.name: {o.name}` needs `objective.estimator: {' or '.join(sorted(objective.estimators))}`, "
            f"not {o.estimator}"
        )
    if "old" in objective.needs and o.level == "token" and estimator.level == "sequence":
        raise ConfigError(
            f"`objective.estimator: {o.estimator}` estimates whole completions: `objective.name: {o.name}` needs "
            "`objective.level: sequence` with it"
        )
    if o.correction != "none" and "behaviour" not in objective.needs:
        raise ConfigError(f"`objective.name: {o.name}` takes no correction: set `objective.correction: none`")
