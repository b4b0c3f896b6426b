"""Save a run's state atomically and load it strictly.

A checkpoint is a folder `checkpoints/step_000100/` with `adapter/` in peft's own format, `state.pt`
(optimizer, schedule), `rng_R.pt` for each rank R, `config.yaml` and `progress.json`. It is written under
another name and renamed, so a folder of this name is always whole.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from rgrl.config import Config, ConfigError, to_dict
from rgrl.models import Policy

_NAME = re.compile(r"step_(\d{6,})")
# What a resumed run must share with the run it goes on from, or its numbers would mean something else.
_FIXED = ("model", "lora", "data", "rollout.num_generations", "run.prompts_per_device", "run.seed")


@dataclass
class Progress:
    """How far a run is. Everything else about its future follows from the config and these."""

    step: int = 0
    num_tokens: int = 0
    skipped_in_a_row: int = 0


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints in `output_dir`, oldest first."""
    found = [p for p in (output_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def check_writable(output_dir: Path) -> None:
    """Raise `ConfigError` unless `output_dir` is a folder to write in, or can become one."""
    nearest = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"`run.output_dir` {output_dir}: {nearest} is not a folder to write in")


def find_checkpoint(config: Config) -> Path | None:
    """The folder to resume from, None for a fresh start. Raises `ConfigError`."""
    wanted, output = config.run.resume_from_checkpoint, Path(config.run.output_dir)
    if wanted is None:
        if (output / "metrics.jsonl").exists() and not checkpoints(output):
            raise ConfigError(
                f"`run.output_dir` {output} already holds a run, stopped before its first checkpoint: delete it or "
                "choose another folder"
            )
        if checkpoints(output):
            raise ConfigError(
                f"`run.output_dir` {output} already holds a run: pass --run.resume_from_checkpoint latest to go on "
                "with it, or choose another folder"
            )
        return None
    if wanted == "latest":
        found = checkpoints(output)
        if not found:
            raise ConfigError(f"nothing to resume: no checkpoint in {output / 'checkpoints'}")
        return found[-1]
    folder = Path(wanted)
    if not (folder / "progress.json").is_file():
        raise ConfigError(f"`run.resume_from_checkpoint` {wanted} is not a checkpoint folder")
    return folder


def check_compatible(folder: Path, config: Config, ranks: int | None, keys: tuple[str, ...] = _FIXED) -> None:
    """Refuse to go on with settings `keys` (or a number of `ranks`) other than the saved ones, naming both values.

    Raises `ConfigError`.
    """
    saved = _read(folder / "config.yaml", lambda path: yaml.safe_load(path.read_text(encoding="utf-8")))
    now = to_dict(config)
    for key in keys:
        before, after = _get(saved, key), _get(now, key)
        if before != after:
            raise ConfigError(f"cannot resume {folder}: `{key}` was {before} and is now {after}")
    if ranks is None:
        return
    if not (folder / f"rng_{ranks - 1}.pt").is_file() or (folder / f"rng_{ranks}.pt").is_file():
        raise ConfigError(f"cannot resume {folder} with {ranks} processes: it was saved with another number")


def _get(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def save(
    accelerator: Accelerator,
    config: Config,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress,
) -> Path:
    """Write `checkpoints/step_N` and keep the newest `run.keep_checkpoints` up to it. Collective.

    Later ones are of a run that was given up for an older checkpoint, as are the metrics it had after that.
    """
    root = Path(config.run.output_dir) / "checkpoints"
    final, partial = root / f"step_{progress.step:06d}", root / f".partial_{progress.step:06d}"
    if accelerator.is_main_process:
        _clear(root)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save(_rng(), partial / f"rng_{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        assert policy.peft_model is not None
        policy.peft_model.save_pretrained(partial / "adapter", save_embedding_layers=False)
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, partial / "state.pt")
        (partial / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
        (partial / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in partial.rglob("*"):
            _flush(path)
        if final.exists():  # a run that went back to an older checkpoint passes the same step again
            _set_aside(final)
        os.replace(partial, final)
        _flush(root)
        found = checkpoints(Path(config.run.output_dir))
        end = found.index(final) + 1
        for old in found[: max(0, end - config.run.keep_checkpoints)] + found[end:]:
            _set_aside(old)
        _clear(root)
    accelerator.wait_for_everyone()
    return final


def _set_aside(folder: Path) -> None:
    """Take a checkpoint's name from it: a kill while it is being deleted must not leave half of it under that name."""
    os.replace(folder, folder.with_name(f".partial_{folder.name}"))


def _clear(root: Path) -> None:
    for leftover in root.glob(".partial_*"):
        shutil.rmtree(leftover)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rng() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_adapter(folder: Path, policy: Policy) -> None:
    """Put a checkpoint's adapter into the policy; every tensor must be there. Raises `ConfigError`."""
    assert policy.peft_model is not None
    adapter = _read(folder / "adapter" / "adapter_model.safetensors", load_file)
    found = {(name, tuple(t.shape)) for name, t in adapter.items()}
    own = get_peft_model_state_dict(policy.peft_model, save_embedding_layers=False)
    if odd := sorted(found ^ {(name, tuple(t.shape)) for name, t in own.items()}):
        raise ConfigError(f"cannot resume {folder}: its adapter does not fit this model (first difference: {odd[0]})")
    set_peft_model_state_dict(policy.peft_model, adapter)


def load(
    folder: Path,
    accelerator: Accelerator,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> Progress:
    """Restore everything `save` wrote; the rate and the weight decay follow the config. Raises `ConfigError`."""
    load_adapter(folder, policy)
    state = _read(folder / "state.pt", lambda path: torch.load(path, weights_only=True, map_location="cpu"))
    optimizer.load_state_dict(state["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
    done, base = state["schedule"]["last_epoch"], schedule.base_lrs
    rates = [lr * share(done) for lr, share in zip(base, schedule.lr_lambdas, strict=True)]
    schedule.load_state_dict(state["schedule"] | {"base_lrs": base, "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    rng = _read(folder / f"rng_{accelerator.process_index}.pt", lambda path: torch.load(path, weights_only=True))
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return _read(folder / "progress.json", lambda path: Progress(**json.loads(path.read_text(encoding="utf-8"))))


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, EOFError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot resume: {path} is missing or damaged ({type(error).__name__})") from error
    except (SafetensorError, pickle.UnpicklingError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot resume: {path} is damaged ({type(error).__name__})") from error
