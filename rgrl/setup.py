"""What a run is made of, loaded and checked before any long work: `set_up`, then its loaders in their order."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator

from rgrl.algo import Algorithm, resolve_algorithm
from rgrl.checkpoint import code_commit, other_base, start_fingerprint
from rgrl.config import Config, DataConfig, ModelConfig
from rgrl.console import warn
from rgrl.data import PromptSet, PromptStream, Tally, fingerprint, fit_both, load_data
from rgrl.data.lengths import check_shapes
from rgrl.data.said import empty_prompt
from rgrl.errors import ConfigError
from rgrl.hub import resolved_revision
from rgrl.models import Policy, add_lora, load_policy
from rgrl.models.lora import adapter_parameters, check_gradients, expand_targets
from rgrl.models.readout import READOUTS, Positions, Readout, token_logp
from rgrl.models.start import read_start, start_from
from rgrl.plugins import resolve
from rgrl.rewards import ClassifierReward, Rewards, load_classifier, load_functions, load_rewards
from rgrl.rewards.bridge import Coverage
from rgrl.rollout.sampling import sampled_logp
from rgrl.runtime.launch import shard_size
from rgrl.seeds import seed_globals
from rgrl.types import Prompts, SomePrompts


@dataclass(frozen=True)
class Run:
    """Everything a run is made of. Nothing is written to it: what changes in a run is in the trainer's loop."""

    config: Config
    accelerator: Accelerator
    policy: Policy
    rewards: Rewards
    guide_model: ClassifierReward | None  # None: rollouts are unguided
    gradient_model: ClassifierReward | None  # whose gradient is a term of the update; None: it has no such term
    judge: ClassifierReward | None
    stream: PromptStream
    eval_prompts: Prompts | None
    parameters: tuple[torch.nn.Parameter, ...]  # of the adapter
    optimizer: torch.optim.Optimizer
    algorithm: Algorithm
    readouts: dict[str, Readout]  # `logp`, and those that the objective asks for
    coverage: Coverage | None  # how the guide is shown the policy's tokens; None: no guide, or nothing is lost
    fingerprints: dict[str, Any]  # of models and data, for checkpoints
    tallies: dict[str, Tally]  # what became of the rows of the data

    def prompts(self, step: int) -> Prompts:
        """This rank's prompts of a training step, counted from 0."""
        return self.stream.batch(step, self.accelerator.process_index)


def set_up(config: Config, accelerator: Accelerator, resumed: bool = False) -> Run:
    """Load every component and check what the settings alone cannot tell. Raises `ConfigError`.

    `Run.config` holds what was found: commits of the Hub, and the names of the layers to adapt. Where a run is
    `resumed`, its adapter is not read from `lora.path`: it will come from the checkpoint.
    """
    # Nothing here uses the global generators, but user code may.
    seed_globals(config.run.seed, 0, accelerator.process_index)
    algorithm = resolve_algorithm(config)
    start = read_start(config.lora) if config.lora.path is not None and not resumed else None
    prompts, evaluation = load_data(config.data, evaluates=config.run.eval_steps > 0)
    rewards = load_reward_functions(config, accelerator, prompts, evaluation)
    policy = load_base(config, accelerator)
    prompts, evaluation = fit_both(prompts, evaluation, policy.reader, config.rollout.max_completion_length)
    eval_prompts = evaluation.take(range(len(evaluation))) if evaluation is not None else None
    models = load_reward_models(config, accelerator, policy, rewards, (prompts, evaluation))
    config = resolved(config, policy, models)
    config = replace(config, data=pinned(config.data, prompts, evaluation))
    adapter = load_adapter(config, accelerator, policy, start)
    parameters, optimizer = load_optimizer(config, policy)
    tallies = {"data": prompts.tally} | ({} if evaluation is None else {"evaluation data": evaluation.tally})
    loaded = {"model": policy, "reward": models.rewards.model, "guide": models.guide, "judge": models.judge}
    return Run(
        config=config,
        accelerator=accelerator,
        policy=policy,
        rewards=models.rewards,
        guide_model=models.guide if config.guidance.kind != "none" else None,
        gradient_model=models.gradient,
        judge=models.judge,
        stream=PromptStream(prompts, config.run.seed, config.run.prompts_per_device, accelerator.num_processes),
        eval_prompts=eval_prompts,
        parameters=parameters,
        optimizer=optimizer,
        algorithm=algorithm,
        readouts=load_readouts(config, algorithm),
        coverage=models.coverage,
        fingerprints=take_fingerprints(loaded, prompts, eval_prompts) | adapter,
        tallies=tallies,
    )


# ------------------------------------------------------------------------------------------------ the loaders
def load_reward_functions(
    config: Config, accelerator: Accelerator, prompts: PromptSet, evaluation: PromptSet | None
) -> Rewards:
    """The Python functions and verifiers, tried once on two completions, before anything that takes long."""
    rewards = load_functions(config.reward)
    check_passes(config, rewards)
    for note in rewards.dry_run(prompts, evaluation):
        if accelerator.is_main_process:
            warn(note)
    return rewards


def load_base(config: Config, accelerator: Accelerator) -> Policy:
    """The frozen policy, on its device, or on the CPU where processes share its layers: a GPU may not hold it whole."""
    size = shard_size(os.environ, accelerator.num_processes)
    check_sharing(config.model, size)
    return load_policy(config.model, accelerator.device if size == 1 else "cpu")


@dataclass(frozen=True)
class RewardModels:
    """The scorer, and who guides, gives the update its gradient, and judges; several may be the same model."""

    rewards: Rewards
    guide: ClassifierReward | None
    gradient: ClassifierReward | None
    judge: ClassifierReward | None

    @property
    def all(self) -> list[ClassifierReward]:
        """Each model once."""
        models = (self.rewards.model, self.guide, self.judge)
        return list({model: None for model in models if model is not None})

    @property
    def coverage(self) -> Coverage | None:
        """How the guide is shown the policy's tokens; None where there is no guide, or nothing is lost."""
        model = self.guide if self.guide is not None else self.gradient
        coverage = model.coverage if model is not None else None
        return None if coverage is None or coverage.same else coverage


def load_reward_models(
    config: Config,
    accelerator: Accelerator,
    policy: Policy,
    rewards: Rewards,
    data: Sequence[PromptSet | None],
) -> RewardModels:
    """Scorer, guide and judge, bound to the policy's tokens where their gradient is used, with room for the prompts."""
    rewards, guide = load_rewards(config, accelerator.device, rewards)
    gradient = None
    if config.gradient.weight > 0:
        gradient = guide if config.gradient.of == "guide" else rewards.model
    guides = guide if config.guidance.kind != "none" else None
    for model in {model: None for model in (guides, gradient) if model is not None}:
        model.bind(policy.tokenizer, policy.vocab_size, config.reward.bridge, policy.end_ids)
    c = config.judge
    judge = None
    if c.path is not None:
        judge = load_classifier(
            c.path, accelerator.device, c.dtype, name="judge", max_length=c.max_length, revision=c.revision
        )
    models = RewardModels(rewards, guide, gradient, judge)
    for model in models.all:
        make_room(model, config, data)
        if model.template.forgeable and accelerator.is_main_process:
            warn(
                f"reward model {model.name}: only plain text stands between prompt and answer, so a completion can "
                "write a turn of its own; read some samples"
            )
    return models


def load_adapter(
    config: Config, accelerator: Accelerator, policy: Policy, start: dict[str, torch.Tensor] | None
) -> dict[str, Any]:
    """Add the adapter, with the weights of `lora.path` (`start`), and share the frozen layers. Collective.

    Returns what `about.json` records of the weights it starts from. Raises `ConfigError`.
    """
    add_lora(policy, config.lora, config.run.seed).eval()
    about: dict[str, Any] = {}
    if start is not None:
        start_from(policy, start, config.lora)
        if accelerator.is_main_process and (problem := other_base(config.lora, policy)) is not None:
            warn(problem)
        about = {"start": start_fingerprint(config.lora)}
    size = shard_size(os.environ, accelerator.num_processes)
    if size > 1:
        accelerator.wait_for_everyone()  # times out if a process could not load something
        policy.shard(accelerator.device, size, timedelta(minutes=config.run.timeout_minutes))
    check_gradients(policy)
    if config.run.gradient_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    return about


def load_optimizer(config: Config, policy: Policy) -> tuple[tuple[torch.nn.Parameter, ...], torch.optim.Optimizer]:
    """The adapter's parameters, and AdamW over them."""
    o, parameters = config.optim, tuple(adapter_parameters(policy).values())
    betas = (o.betas[0], o.betas[1])
    return parameters, torch.optim.AdamW(parameters, lr=o.learning_rate, betas=betas, weight_decay=o.weight_decay)


def load_readouts(config: Config, algorithm: Algorithm) -> dict[str, Readout]:
    """What the update evaluates at each position: the log-probability, and what the objective asks for by name."""

    def sampler_logp(positions: Positions) -> torch.Tensor:
        r = config.rollout
        return sampled_logp(positions.logits_NV, positions.token_N, r.temperature, r.top_k, r.top_p)

    logp = sampler_logp if algorithm.estimator.as_sampled else token_logp
    return {"logp": logp} | {name: resolve(name, "readout", READOUTS) for name in algorithm.objective.readouts}


# -------------------------------------------------------------------------------------------------- the checks
def check_passes(config: Config, rewards: Rewards) -> None:
    """Raise `ConfigError` where `eval.passes` names a reward that the run does not have."""
    known = [*([config.reward.name] if config.reward.path is not None else []), *rewards.functions]
    if odd := [name for name in config.eval.passes if name not in known]:
        raise ConfigError(f"`eval.passes.{odd[0]}`: no reward of this run has this name; known: {', '.join(known)}")


def check_sharing(model: ModelConfig, size: int) -> None:
    """Raise `ConfigError` for what does not work where `size` processes share the frozen layers (FSDP2)."""
    for name, value in (("quantize", model.quantize), ("attn_implementation", model.attn_implementation)):
        if size > 1 and value not in ("none", "sdpa", "eager"):
            raise ConfigError(
                f"`model.{name}: {value}` does not work where processes share the frozen layers (FSDP2): launch with "
                f"launch/ddp.yaml, or leave `model.{name}` out"
            )


def resolved(config: Config, policy: Policy, models: RewardModels) -> Config:
    """The settings with what they left open as it was found, so that a run from them has the same models anywhere."""

    def pin(path: str | None, revision: str | None, model: Policy | ClassifierReward | None) -> str | None:
        return resolved_revision(path, revision, model.fingerprint.get("commit")) if path and model else revision

    m, r, g, j = config.model, config.reward, config.guidance, config.judge
    return replace(
        config,
        model=replace(m, revision=pin(m.path, m.revision, policy)),
        lora=replace(config.lora, targets=expand_targets(policy, config.lora.targets)),
        reward=replace(r, revision=pin(r.path, r.revision, models.rewards.model)),
        guidance=replace(g, revision=pin(g.path, g.revision, models.guide)),
        judge=replace(j, revision=pin(j.path, j.revision, models.judge)),
    )


def pinned(data: DataConfig, training: PromptSet, evaluation: PromptSet | None) -> DataConfig:
    """The settings with the commits that were read of data sets of the Hub."""
    other = evaluation.data.commit if evaluation is not None and data.eval_path is not None else None
    return replace(data, revision=training.data.commit or data.revision, eval_revision=other or data.eval_revision)


def take_fingerprints(
    models: dict[str, Policy | ClassifierReward | None], prompts: SomePrompts, eval_prompts: Prompts | None
) -> dict[str, Any]:
    """What identifies the code, the models and the data of a run, as `about.json` of its checkpoints has it.

    Taken before the run begins: a reward function is given the rows themselves, and may write into them.
    """
    found: dict[str, Any] = dict(fingerprint(prompts)) | {"commit": code_commit()}
    if eval_prompts is not None:
        found["eval"] = fingerprint(eval_prompts)
    return found | {name: model.fingerprint for name, model in models.items() if model is not None}


def make_room(model: ClassifierReward, config: Config, data: Sequence[PromptSet | None]) -> None:
    """Refuse a reward model that cannot be shown the prompts beside a completion. Raises `ConfigError`."""
    for prompts in data:
        if prompts is not None:
            check_shapes(prompts, model.template.check_shape)
    model.template.make_room(config.rollout.max_completion_length, empty_prompt(config.data))
