"""What a command prints before it begins: where it runs, what it trains, how large a step is, where records go."""

import torch
from accelerate import Accelerator

import rgrl
from rgrl.algo.corrections import exact
from rgrl.config import Config
from rgrl.models import Policy
from rgrl.models.lora import adapter_parameters
from rgrl.models.quantize import full_size
from rgrl.rewards import ClassifierReward
from rgrl.setup import Run


def header(run: Run, first_step: int, records: str) -> list[str]:
    """The lines before the first step of a run. `records` names where they go besides the output folder."""
    config, last_step = run.config, run.config.run.steps
    steps = f"steps {first_step} ... {last_step}" if first_step <= last_step else f"all {last_step} steps are done"
    lines = [
        what_runs(run),
        f"{a_step(config, run.accelerator.num_processes)} | {steps}",
        what_is_learned(config),
        f"{config.run.output_dir} | {records or 'W&B off'}",
        *reward_models(run),
    ]
    lines += data(run)
    if config.lora.path is not None and first_step == 1:
        lines.append(f"starting from the adapter {config.lora.path}")
    if (coverage := run.coverage) is not None:
        lines.append(str(coverage))
    if config.objective.correction != "none" and config.guidance.kind != "none":
        kind = "exact" if exact(config) else "an approximation (see `exact` in rgrl/algo/corrections.py)"
        lines.append(f"correcting for guidance: the ratio of a whole completion is {kind}")
    return lines


def what_runs(run: Run) -> str:
    """Version, processes and policy, in one line."""
    return f"rgrl {rgrl.__version__} | {processes(run.accelerator)} | {policy(run.policy, run.config)}"


def processes(accelerator: Accelerator) -> str:
    """How many, and on what."""
    device, n = accelerator.device, accelerator.num_processes
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    each = "" if device.type == "cuda" else f" ({count(torch.get_num_threads(), 'thread')}{' each' if n > 1 else ''})"
    return f"{count(n, 'process', 'processes')} on {on}{each}"


def policy(model: Policy, config: Config) -> str:
    """The policy's family and size, and how much of it is trained."""
    trained = sum(p.numel() for p in adapter_parameters(model).values())
    frozen = sum(full_size(p) for p in model.parameters()) - trained
    dtype = "" if config.model.dtype == "float32" else f" in {config.model.dtype}"
    if config.model.quantize != "none":
        dtype += f", layers in {config.model.quantize}"
    size = f"{short(frozen)} parameters{dtype}, {short(trained)} trainable (LoRA r {config.lora.r})"
    return f"policy {model.family.name}, {size}"


def data(run: Run) -> list[str]:
    """What was left out of the data, or cut; nothing where all of it is used as it is."""
    return [
        f"{name}: of {tally.rows:,} rows {words}" for name, tally in run.tallies.items() if (words := tally.words())
    ]


def reward_models(run: Run) -> list[str]:
    """Each reward model, what it is used for, and how it guides or why it could not: in one line."""
    uses: dict[ClassifierReward, list[str]] = {}
    found = {"scores": run.rewards.model, "guides": run.guide_model, "judges": run.judge}
    for use, model in (found | {"gives the update its gradient": run.gradient_model}).items():
        if model is not None:
            uses.setdefault(model, []).append(use)
    lines = []
    for model, used in uses.items():
        if model.backend is None:
            used.append(f"could not guide ({'; '.join(model.reasons.values())})")
        elif "guides" in used:
            used.append(
                "each prompt is computed once"
                if model.backend == "prefix_cached"
                else "the whole text is computed at every step"
            )
        lines.append(f"reward model {model.name}, {type(model.model).__name__}: {', '.join(used)}")
    return lines


def a_step(config: Config, n: int) -> str:
    """The rows of a step over all processes, and how many of them are guided."""
    P, G, kind = config.run.prompts_per_device, config.rollout.num_generations, config.guidance.kind
    rows = f"{n} x {P} prompts x {G}" if n > 1 else f"{P} prompts x {G}"
    fraction = round(config.guidance.share * G) / G if kind != "none" else 0.0
    guided = f"{100 * fraction:.0f} % guided" + (f" by {kind}" if fraction else "")
    return f"{n * P * G} rows a step ({rows} completions), {guided}"


def what_is_learned(config: Config) -> str:
    """The terms of the loss, and how many updates a rollout."""
    o, g, terms = config.objective, config.gradient, []
    if o.weight > 0:
        weight = "" if o.weight == 1 else f"{o.weight:g} x "
        terms.append(f"{weight}{o.name} with {o.advantage} advantages" + (f", KL {o.beta:g}" if o.beta else ""))
    if g.weight > 0:
        weight = "" if g.weight == 1 else f"{g.weight:g} x "
        owner = "guide's" if g.of == "guide" else "reward's"
        terms.append(f"{weight}the {owner} gradient ({g.states} states, KL {g.kl:g})")
    return f"learning from {' + '.join(terms)} | {count(config.optim.updates, 'update')} a rollout"


def count(n: int, one: str, many: str | None = None) -> str:
    """A number and its noun."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def short(n: int) -> str:
    """A number with a unit: 5.2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.1f}".removesuffix(".0") + unit
    return str(n)
