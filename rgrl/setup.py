"""What a run is made of, loaded and checked before any long work: processes, models, data, algorithm, evaluators."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator

from rgrl.algo import Algorithm, resolve_algorithm
from rgrl.algo.reward_gradient import surprise
from rgrl.checkpoint import code_commit, other_base, start_fingerprint
from rgrl.config import Config, DataConfig, GuidanceConfig, JudgeConfig, LoraConfig, ModelConfig
from rgrl.console import warn
from rgrl.data import PromptSet, PromptStream, Tally, fingerprint, fit_both, load_data
from rgrl.data.lengths import check_shapes
from rgrl.data.said import empty_prompt
from rgrl.errors import ConfigError
from rgrl.evaluation import Evaluator, noise_of, sampler
from rgrl.evaluation.held_out import HeldOut
from rgrl.folder import Owner
from rgrl.hub import resolved_revision
from rgrl.models import Policy, add_lora, load_policy
from rgrl.models.lora import adapter_parameters, check_gradients, expand_targets
from rgrl.models.readout import READOUTS, Places, Readout, token_logp
from rgrl.models.start import read_start, start_from
from rgrl.plugins import resolve
from rgrl.rewards import ClassifierReward, Rewards, load_classifier, load_functions, load_rewards
from rgrl.rewards.bridge import Coverage
from rgrl.rollout import Guidance, generate
from rgrl.rollout.guidance import Guide, guidance_at
from rgrl.rollout.sampling import sampled_logp
from rgrl.runtime.launch import shard_size
from rgrl.seeds import generator, seed_globals
from rgrl.types import Prompts, Rollout, SomePrompts


@dataclass
class Run:
    """Everything a run is made of."""

    config: Config
    accelerator: Accelerator
    policy: Policy
    rewards: Rewards
    guide_model: ClassifierReward | None  # None: rollouts are unguided
    gradient_model: ClassifierReward | None  # whose gradient is a term of the update; None: it has no such term
    judge: ClassifierReward | None
    stream: PromptStream
    eval_prompts: Prompts | None
    optimizer: torch.optim.Optimizer
    algorithm: Algorithm
    readouts: dict[str, Readout]  # `logp`, and those that the objective asks for
    fingerprints: dict[str, Any]  # of models and data, for checkpoints
    tallies: dict[str, Tally] = field(default_factory=dict)  # what became of the rows of the data
    evaluators: list[Evaluator] = field(default_factory=list)
    owner: Owner | None = None  # whose the output folder is; set where it is written to
    tell: Callable[[str], None] = lambda text: None  # shows a few words beside the bar; the loop sets it

    @property
    def coverage(self) -> Coverage | None:
        """How the guide is shown the policy's tokens; None where there is no guide, or nothing is lost."""
        model = self.guide_model if self.guide_model is not None else self.gradient_model
        coverage = model.coverage if model is not None else None
        return None if coverage is None or coverage.same else coverage

    def guidance(self, settings: GuidanceConfig) -> Guidance | None:
        """What steers rollouts under these settings; None if nothing does."""
        if settings.kind == "none" or self.guide_model is None:
            return None
        return self.guide_model.guidance(settings, self.config.reward.attend_eos)

    def reward_of_embeddings(self, prompts: Prompts) -> Guide:
        """The reward whose gradient is a term of the update, of completions of `prompts`."""
        assert self.gradient_model is not None
        return self.gradient_model.guidance(GuidanceConfig(), self.config.reward.attend_eos).guide(prompts)

    @property
    def gradient_weight(self) -> float:
        """What that reward counts within the term: the model's weight in the sum of rewards."""
        return self.config.reward.weight if self.config.gradient.of == "reward" else 1.0

    def generate(
        self,
        prompts: Prompts,
        numbers: Sequence[int],
        guidance: Guidance | None = None,
        samples: Sequence[int] | None = None,
    ) -> Rollout:
        """Completions for evaluation (`rgrl.evaluation.Generate`)."""
        which = samples if samples is not None else [0] * len(numbers)
        seed = self.config.run.seed
        seeds = [generator(seed, 0, i, noise_of("eval", s)) for i, s in zip(numbers, which, strict=True)]
        return generate(self.policy, prompts, sampler(self.config), seeds, guidance)


def set_up(config: Config, accelerator: Accelerator, resumed: bool = False) -> Run:
    """Load every component and check what the settings alone cannot tell. Raises `ConfigError`.

    `Run.config` says what was found: commits of the Hub, and the names of the layers to adapt. Where a run is
    `resumed`, its adapter is not read from `lora.path`: it will come from the checkpoint.
    """
    device = accelerator.device
    # Nothing here uses the global generators, but a user's own reward or objective may.
    seed_globals(config.run.seed, 0, accelerator.process_index)
    algorithm = resolve_algorithm(config)
    readouts = resolve_readouts(config, algorithm)
    start = read_start(config.lora) if config.lora.path is not None and not resumed else None
    prompts, evaluation = load_data(config.data, evaluates=config.run.eval_steps > 0)
    rewards = load_functions(config.reward)
    check_passes(config, rewards)
    for note in rewards.try_out(prompts, evaluation):  # before anything that takes long
        if accelerator.is_main_process:
            warn(note)
    size = shard_size(os.environ, accelerator.num_processes)
    check_sharing(config.model, size)
    policy = load_policy(config.model, device if size == 1 else "cpu")  # a GPU may not hold it whole
    prompts, evaluation = fit_both(prompts, evaluation, policy.reader, config.rollout.max_completion_length)
    eval_prompts = evaluation.take(range(len(evaluation))) if evaluation is not None else None
    rewards, guide = load_rewards(config, device, rewards, "row_gradients" in algorithm.needs)
    guide_model, gradient_model = bind_guides(config, policy, algorithm, rewards, guide)
    readouts |= reward_readouts(config, algorithm, gradient_model)
    judge = load_judge(config.judge, device)
    for model in {model: None for model in (rewards.model, guide, judge) if model is not None}:
        make_room(model, config, (prompts, evaluation))
        if model.frame.forgeable and accelerator.is_main_process:
            warn(
                f"reward model {model.name}: only plain text stands between prompt and answer, so a completion can "
                "write a turn of its own; read some samples"
            )
    config = resolved(config, policy, rewards, guide, judge)
    config = replace(config, data=pinned(config.data, prompts, evaluation))
    add_lora(policy, config.lora, config.run.seed).eval()
    begun = {} if start is None else begin_with(start, policy, config.lora, accelerator)
    if size > 1:
        accelerator.wait_for_everyone()  # times out if a process could not load something
        policy.shard(device, size, timedelta(minutes=config.run.timeout_minutes))
    check_gradients(policy)
    if config.run.gradient_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    o = config.optim
    parameters = list(adapter_parameters(policy).values())
    betas = (o.betas[0], o.betas[1])
    optimizer = torch.optim.AdamW(parameters, lr=o.learning_rate, betas=betas, weight_decay=o.weight_decay)
    stream = PromptStream(prompts, config.run.seed, config.run.prompts_per_device, accelerator.num_processes)
    fingerprints = take_fingerprints(
        {"model": policy, "reward": rewards.model, "guide": guide, "judge": judge}, prompts, eval_prompts
    )
    models = policy, rewards, guide_model, gradient_model, judge
    run = Run(config, accelerator, *models, stream, eval_prompts, optimizer, algorithm, readouts, fingerprints | begun)
    run.tallies = {"data": prompts.tally} | ({} if evaluation is None else {"evaluation data": evaluation.tally})
    if eval_prompts is not None:
        held_out = policy, rewards, judge, eval_prompts, lambda step: run.guidance(guidance_at(config, step))
        run.evaluators.append(HeldOut(config, accelerator, *held_out, tell=lambda text: run.tell(text)))
    return run


def check_passes(config: Config, rewards: Rewards) -> None:
    """Raise `ConfigError` where `eval.passes` names a reward that the run does not have."""
    known = [*([config.reward.name] if config.reward.path is not None else []), *rewards.functions]
    if odd := [name for name in config.eval.passes if name not in known]:
        raise ConfigError(f"`eval.passes.{odd[0]}`: no reward of this run has this name; known: {', '.join(known)}")


def bind_guides(
    config: Config, policy: Policy, algorithm: Algorithm, rewards: Rewards, guide: ClassifierReward | None
) -> tuple[ClassifierReward | None, ClassifierReward | None]:
    """Who guides rollouts, and whose gradient is a term of the update, each bound to the policy's tokens or None."""
    guide_model = guide if config.guidance.kind != "none" else None
    gradient_model = None
    if config.gradient.weight > 0 or "row_gradients" in algorithm.needs:
        gradient_model = guide if config.gradient.of == "guide" else rewards.model
    for model in {model: None for model in (guide_model, gradient_model) if model is not None}:
        model.bind(policy.tokenizer, policy.vocab_size, config.reward.bridge, policy.end_ids)
    return guide_model, gradient_model


def load_judge(config: JudgeConfig, device: torch.device) -> ClassifierReward | None:
    """The judge, if there is one."""
    c = config
    if c.path is None:
        return None
    return load_classifier(c.path, device, c.dtype, name="judge", max_length=c.max_length, revision=c.revision)


def begin_with(
    start: dict[str, torch.Tensor], policy: Policy, config: LoraConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """Load the adapter that `lora.path` names; returns what `about.json` says of it. Raises `ConfigError`."""
    start_from(policy, start, config)
    if accelerator.is_main_process and (problem := other_base(config, policy)) is not None:
        warn(problem)
    return {"start": start_fingerprint(config)}


def check_sharing(model: ModelConfig, size: int) -> None:
    """Raise `ConfigError` for what does not work where `size` processes share the frozen layers (FSDP2)."""
    for name, value in (("quantize", model.quantize), ("attn_implementation", model.attn_implementation)):
        if size > 1 and value not in ("none", "sdpa", "eager"):
            raise ConfigError(
                f"`model.{name}: {value}` does not work where processes share the frozen layers (FSDP2): launch with "
                f"launch/ddp.yaml, or leave `model.{name}` out"
            )


def resolved(
    config: Config,
    policy: Policy,
    rewards: Rewards,
    guide_model: ClassifierReward | None,
    judge: ClassifierReward | None,
) -> Config:
    """The settings with what they left open as it was found, so that a run from them has the same models anywhere."""

    def pin(path: str | None, revision: str | None, model: Policy | ClassifierReward | None) -> str | None:
        return resolved_revision(path, revision, model.fingerprint.get("commit")) if path and model else revision

    m, r, g, j = config.model, config.reward, config.guidance, config.judge
    return replace(
        config,
        model=replace(m, revision=pin(m.path, m.revision, policy)),
        lora=replace(config.lora, targets=expand_targets(policy, config.lora.targets)),
        reward=replace(r, revision=pin(r.path, r.revision, rewards.model)),
        guidance=replace(g, revision=pin(g.path, g.revision, guide_model)),
        judge=replace(j, revision=pin(j.path, j.revision, judge)),
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
            check_shapes(prompts, model.frame.check_shape)
    model.frame.make_room(config.rollout.max_completion_length, empty_prompt(config.data))


def resolve_readouts(config: Config, algorithm: Algorithm) -> dict[str, Readout]:
    """What the update evaluates at each place: the log-probability, and what the objective asks for by name."""

    def sampler_logp(places: Places) -> torch.Tensor:
        r = config.rollout
        return sampled_logp(places.logits_NV, places.token_N, r.temperature, r.top_k, r.top_p)

    logp = sampler_logp if algorithm.estimator.as_sampled else token_logp
    names = [name for name in algorithm.objective.readouts if name != "surprise"]
    return {"logp": logp} | {name: resolve(name, "readout", READOUTS) for name in names}


def reward_readouts(
    config: Config, algorithm: Algorithm, gradient_model: ClassifierReward | None
) -> dict[str, Readout]:
    """Those that need the reward model's embeddings."""
    if "surprise" not in algorithm.objective.readouts or gradient_model is None:
        return {}
    table_VD = gradient_model.embedding_VD
    assert table_VD is not None

    def surprise_of(places: Places) -> torch.Tensor:
        g_ND = places.given["gradient_ND"]
        return surprise(places.logits_NV, places.token_N, g_ND, table_VD, config.rollout)

    return {"surprise": surprise_of}
