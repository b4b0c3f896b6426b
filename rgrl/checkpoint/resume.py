"""Refuse to resume what does not fit, and load a checkpoint strictly. Which one it is, is found in choose.py."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rgrl.checkpoint.content import about, progress_of, read_file, settings_of, state_of
from rgrl.checkpoint.format import Progress, unpack, versions
from rgrl.config import Config, to_dict
from rgrl.console import warn
from rgrl.errors import ConfigError
from rgrl.models import Policy
from rgrl.models.adapter import fit_adapter, read_adapter
from rgrl.models.fingerprint import adapter_fingerprint, differing_parts
from rgrl.models.names import to_ours
from rgrl.seeds import seed_globals, set_global_state

# Settings that a resumed run must share with its earlier part: it could not go on from the same state, or would be
# another experiment in the same curve. Models and data are compared by content, not by where they lie. Everything else
# may change, as a user who changes a rate, a reward or guidance in the middle of a run means to.
MODEL = ("model.dtype", "model.quantize", "model.mask_token", "model.shifted", "lora")
_FIXED = (*MODEL, "rollout.num_generations", "run.seed")


def check_compatible(folder: Path, config: Config, ranks: int | None, keys: tuple[str, ...] = _FIXED) -> None:
    """Refuse to go on with settings `keys` other than the saved ones, naming both values. Raises `ConfigError`.

    A key may be a whole section. With a number of `ranks`, to train on, also refuse another number of prompts per step,
    which determines the position in the data.
    """
    saved = settings_of(folder)
    if ranks is not None and "model" not in about(folder):  # older than fingerprints: the same path has to do
        keys = (*keys, "model.path")
        if not saved["model"]["path"].startswith("/") and Path(saved["model"]["path"]).exists():  # as it was given then
            saved["model"]["path"] = str(Path.cwd() / saved["model"]["path"])
    # A setting younger than the checkpoint had its default.
    before, now = _leaves(to_dict(Config()), keys) | _leaves(saved, keys), _leaves(to_dict(config), keys)
    if "auto" in config.lora.targets:  # compared again once the model says what that is
        before["lora.targets"] = now.get("lora.targets")
    changed = [
        f"`{key}` was {before.get(key)} and is now {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and key != "lora.path"  # see `check_start`
    ]
    if changed:
        raise ConfigError(f"cannot resume {folder}: {', '.join(changed)}")
    if ranks is None:
        return
    processes, per_device = about(folder)["processes"], saved["run"]["prompts_per_device"]
    total, own = processes * per_device, config.run.prompts_per_device
    if total != ranks * own:
        remedy = (
            f"set `run.prompts_per_device` to {total // ranks}"
            if total % ranks == 0
            else f"start a number of processes that divides {total}"
        )
        raise ConfigError(
            f"cannot resume {folder}: a step had {total} prompts ({processes} processes x `run.prompts_per_device` "
            f"{per_device}) and would now have {ranks * own} ({ranks} x {own}); {remedy}"
        )


def _leaves(tree: dict[str, Any], keys: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    """The settings in a tree that `keys` name, themselves or by their section: `lora.r` -> 4."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict):
            found |= _leaves(value, keys, f"{key}.")
        elif any(f"{key}.".startswith(f"{wanted}.") for wanted in keys):
            found[key] = value
    return found


def check_model(folder: Path, policy: Policy) -> None:
    """Refuse to go on with another base model than the saved run's, wherever the two lie. Raises `ConfigError`."""
    before, now = about(folder).get("model"), policy.fingerprint
    if before is None:  # older than fingerprints: see `check_compatible`
        return
    if before["family"] != now["family"]:
        raise ConfigError(f"cannot resume {folder}: `model.family` was {before['family']} and is now {now['family']}")
    if changed := differing_parts(before, now):
        commits = [(model.get("commit") or "none")[:12] for model in (before, now)]
        told = "" if commits[0] == commits[1] else f" (commit of the Hub: then {commits[0]}, now {commits[1]})"
        raise ConfigError(
            f"cannot resume {folder}: `model.path` {policy.path} is not the model of that run, its "
            f"{' and '.join(changed)} differ{told}; set it to where that model is now"
        )


def check_start(folder: Path, config: Config) -> None:
    """Refuse to go on with a `lora.path` other than the run's, which would not be read. Raises `ConfigError`.

    The run does not need it any more: None will do, as will a copy of the same content elsewhere.
    """
    before, now = about(folder).get("start"), config.lora.path
    if now is None or (before is not None and now == str(Path.cwd() / before["path"])):
        return
    if before is not None and Path(now).is_dir() and adapter_fingerprint(Path(now)) == before["adapter"]:
        return
    raise ConfigError(
        f"cannot resume {folder}: `lora.path` was {before and before['path']} and is now {now}, but it is only read "
        "where a run begins; set it back, or to null"
    )


def kept(folder: Path) -> dict[str, Any]:
    """What the checkpoints of a resumed run go on saying in `about.json`, though it can no longer be seen."""
    before = about(folder)
    return {name: before[name] for name in ("start",) if name in before}


def check_data(folder: Path, fingerprints: dict[str, Any]) -> None:
    """Refuse to go on with other training data than the saved run's, wherever they lie. Raises `ConfigError`."""
    before = about(folder)
    if before["prompts"] != fingerprints["prompts"]:
        raise ConfigError(
            f"cannot resume {folder}: `data.path` held {before['prompts']} and now holds {fingerprints['prompts']}"
        )
    if before.get("rows", fingerprints["rows"]) != fingerprints["rows"]:
        raise ConfigError(
            f"cannot resume {folder}: `data.path` holds the same prompts, but its other columns, which rewards may "
            "read, are not those of that run; restore them"
        )


def warn_changed_models(folder: Path, fingerprints: dict[str, Any], config: Config) -> None:
    """Say in one line which of the things that a run is measured with are not the saved run's."""
    before = about(folder)
    changed = []
    for name, words in (("reward", "the reward model"), ("guide", "the guide"), ("judge", "the judge")):
        if name in before and name in fingerprints and (parts := differing_parts(before[name], fingerprints[name])):
            changed.append(f"{words} ({', '.join(parts)})")
    if "eval" in before and "eval" in fingerprints and before["eval"] != fingerprints["eval"]:
        changed.append("the evaluation data")
    if "eval" in fingerprints and (names := _other_evaluation(folder, config)):
        changed.append(" and ".join(names))
    if changed:
        warn(f"not the same as in {folder}: {', '.join(changed)}; expect a kink in the curves at this step")


def _other_evaluation(folder: Path, config: Config) -> list[str]:
    """The settings of `eval` that are others than the saved run's, by name."""
    saved = settings_of(folder)
    before = to_dict(Config().eval) | saved.get("eval", {})
    names = [f"`eval.{name}`" for name, value in to_dict(config.eval).items() if before[name] != value]
    at = [
        own if own is not None else rollout
        for own, rollout in (
            (before["temperature"], saved["rollout"].get("temperature", Config().rollout.temperature)),
            (config.eval.temperature, config.rollout.temperature),
        )
    ]
    return [name for name in names if name != "`eval.temperature`" or at[0] != at[1]]


def load_adapter(folder: Path, policy: Policy) -> None:
    """Load a checkpoint's adapter into the policy; every tensor must fit. Raises `ConfigError`."""
    assert policy.peft_model is not None
    what = f"cannot resume {folder}: its adapter"
    tensors = read_adapter(folder / "adapter", what)[1]
    fit_adapter(policy.peft_model, to_ours(tensors, policy.names), what)


def load(
    folder: Path, accelerator: Accelerator, policy: Policy, optimizer: torch.optim.Optimizer, seed: int
) -> Progress:
    """Restore everything `Saver` wrote; the rate and the weight decay follow the config. Raises `ConfigError`.

    The global random state belongs to a rank. With another number of ranks, each seeds a new one from `seed`, the step
    and its own number. Random numbers of this package belong to prompts and are the same either way.
    """
    load_adapter(folder, policy)
    state, progress = state_of(folder), progress_of(folder)
    read_file(folder / "state.pt", lambda _: unpack(state["optimizer"], optimizer))
    if len(state["rng"]) == accelerator.num_processes:
        set_global_state(state["rng"][accelerator.process_index])
    else:
        seed_globals(seed, progress.step, accelerator.process_index)
    if accelerator.is_main_process:
        before = about(folder)["versions"]
        for name, now in versions().items():
            if before[name] != now:
                warn(f"{folder} was saved with {name} {before[name]}, this is {now}: last digits may differ")
    return progress
