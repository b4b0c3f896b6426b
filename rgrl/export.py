"""`rgrl export`: a run's adapter, or the base with it merged in, as a folder that others can load and publish."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from rgrl.checkpoint.content import about, check_content, progress_of, settings_of
from rgrl.checkpoint.format import checkpoints, damage, step_of
from rgrl.checkpoint.save import flush
from rgrl.console import warn
from rgrl.errors import ConfigError
from rgrl.hub import fetch_checkpoint, read_json, resolved_revision, weight_files
from rgrl.models.adapter import read_adapter
from rgrl.models.families import find_family
from rgrl.models.fingerprint import differing_parts, fingerprint
from rgrl.models.merge import plan, write_merged
from rgrl.models.names import layer_of, original_layers, target_modules, to_original
from rgrl.models.weights import find_weights
from rgrl.tracking import report
from rgrl.tracking.card import Facts, card, public_name

# What a checkpoint consists of beside its weights: config, tokenizer, the authors' code and terms. All else stays.
_COPIED = (
    "*.json",
    "*.txt",
    "*.jinja",
    "*.py",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "**/*.py",
    "**/*.jinja",
)


@dataclass(frozen=True)
class Source:
    """The checkpoint to export."""

    folder: Path
    run: Path | None  # the run's folder; None where only the checkpoint is there
    config: dict[str, Any]
    about: dict[str, Any]
    step: int


def export(run: Path, merge: bool, checkpoint: str, output: Path | None, model: str | None) -> Path:
    """Write a checkpoint's adapter, or with `merge` the whole model, and its card; returns the folder.

    `run` is a run's folder or a checkpoint's, `checkpoint` which one of a run ("latest", a step, or a folder), `model`
    where the base is now (None: where the run had it). Raises `ConfigError` before anything is written.
    """
    source = find(run, checkpoint)
    if output is None:
        above = source.run or source.folder.parent
        output = above / "export" / (source.folder.name + ("_merged" if merge else ""))
    check_free(output)
    tensors, settings = read_adapter_of(source, model)
    facts = Facts(source.config, source.about, source.step, table_of(source), merge)
    if not merge:
        with whole(output) as partial:
            content = safetensors_bytes(tensors, {"format": "pt"})
            (partial / "adapter_model.safetensors").write_bytes(content)
            text = json.dumps(settings, indent=2, sort_keys=True)
            (partial / "adapter_config.json").write_text(text, encoding="utf-8")
            (partial / "README.md").write_text(card(facts), encoding="utf-8")
        return output
    if (quantize := source.config["model"].get("quantize", "none")) != "none":
        raise ConfigError(
            f"{source.folder} was trained on a base in {quantize} (`model.quantize`), and nothing can be merged into "
            "that: export the adapter, without --merge"
        )
    base = find_base(source, model)
    updates = plan(base, tensors, settings["lora_alpha"] / settings["r"])
    check_room(base, output)
    if (absent := missing_code(base)) is not None:
        warn(f"{base} lacks {absent}, which its config.json names: the merged model will load in rgrl alone")
    with whole(output) as partial:
        write_merged(base, partial, updates)
        copy_rest(base, partial)
        (partial / "README.md").write_text(card(facts), encoding="utf-8")
    return output


def find(run: Path, checkpoint: str) -> Source:
    """The checkpoint that is meant, whole. Raises `ConfigError`."""
    if not run.is_dir():
        raise ConfigError(f"{run}: {'not a folder' if run.exists() else 'no such folder'}")
    if (run / "manifest.json").is_file():
        if checkpoint != "latest":
            raise ConfigError(f"{run} is a checkpoint itself: leave out --checkpoint {checkpoint}")
        folder = run
    else:
        folder = choose(run, checkpoint)
    if (problem := damage(folder)) is not None:
        raise ConfigError(f"{folder} is damaged: {problem}")
    check_content(folder)
    above = Path(os.path.abspath(folder)).parent
    own = above.parent if above.name == "checkpoints" and (above.parent / "metrics.jsonl").is_file() else None
    return Source(folder, own if folder == run else run, settings_of(folder), about(folder), progress_of(folder).step)


def choose(run: Path, checkpoint: str) -> Path:
    """The checkpoint of a run by its step, its folder, or `latest`: the newest whole one. Raises `ConfigError`."""
    found = checkpoints(run)
    if not found:
        raise ConfigError(f"{run} holds no checkpoint: expected a run's folder (`run.output_dir`), or a checkpoint's")
    if checkpoint == "latest":
        for folder in reversed(found):
            if (problem := damage(folder)) is None:
                return folder
            warn(f"{folder} is damaged: {problem}")
        raise ConfigError(f"{run} holds no whole checkpoint")
    by_step = {str(step_of(folder)): folder for folder in found}
    if checkpoint.isdecimal():
        if checkpoint.lstrip("0") not in by_step:
            raise ConfigError(f"--checkpoint {checkpoint}: {run} has those of the steps {', '.join(by_step)}")
        return by_step[checkpoint.lstrip("0")]
    if (run / "checkpoints" / checkpoint / "manifest.json").is_file():  # where it is absolute, it stands alone
        return run / "checkpoints" / checkpoint
    raise ConfigError(
        f"--checkpoint {checkpoint}: expected `latest`, a step or the folder of one of {run}'s checkpoints"
    )


def read_adapter_of(source: Source, model: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter under its base's own names, and its adapter_config.json as it may be published.

    A checkpoint from before adapters had these names needs the base to find them. Raises `ConfigError`.
    """
    folder = source.folder / "adapter"
    tensors = read_adapter(folder, str(folder))[1]
    settings = read_json(folder / "adapter_config.json")
    if settings.get("task_type") is not None:
        base = find_base(source, model)
        family = find_family(read_json(base / "config.json").get("model_type"), source.config["model"]["family"])
        names = {family.rename(name): name for name in find_weights(base, str(base))}
        tensors = to_original(tensors, names)
        adapted = {layer for name in tensors if (layer := layer_of(name)) is not None}
        layers = original_layers(names).values()
        settings |= {"task_type": None, "target_modules": target_modules(adapted, layers)}
    name, commit = public_name(source.config["model"]["path"]), (source.about.get("model") or {}).get("commit")
    return tensors, settings | {"base_model_name_or_path": name, "revision": commit}


def find_base(source: Source, model: str | None) -> Path:
    """The folder of the run's base model, which is the same as then. Raises `ConfigError`."""
    path, before = model or source.config["model"]["path"], source.about.get("model")
    revision = source.config["model"].get("revision") or (before or {}).get("commit")
    try:
        pinned = resolved_revision(path, revision, None)
        base = fetch_checkpoint(path, "--model" if model else "`model.path`", pinned, code=True)
    except ConfigError as error:
        remedy = "" if model else "; say with --model where the run's base is now"
        raise ConfigError(f"{error}{remedy}") from error
    if before is not None and (changed := differing_parts(before, fingerprint(base))):
        raise ConfigError(
            f"{base} is not the model that {source.folder} was trained on, its {' and '.join(changed)} differ: say "
            "with --model where that is now"
        )
    return base


def table_of(source: Source) -> str | None:
    """The report's table up to the checkpoint's step; None where the run's metrics are not there."""
    if source.run is None:
        return None
    report.check(source.run)
    return report.summary(source.run, source.step)


def check_free(output: Path) -> None:
    """Raise `ConfigError` unless `output` is an empty folder or nothing yet, in a place that can be written."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is not a folder")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"--output {output} is there already and not empty: name another folder")
    nearest = next(path for path in output.absolute().parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--output {output}: {nearest} is not a folder to write in")


def check_room(base: Path, output: Path) -> None:
    """Raise `ConfigError` where the disk has no room for another copy of the weights."""
    needed = sum((base / file).stat().st_size for file in weight_files(base))
    free = shutil.disk_usage(next(path for path in output.absolute().parents if path.exists())).free
    if free < needed:
        raise ConfigError(f"--output {output}: {needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")


def missing_code(base: Path) -> str | None:
    """A file of the authors' code that config.json names and that is not there; None if there is none."""
    named = read_json(base / "config.json").get("auto_map") or {}
    modules = {str(name).rpartition(".")[0] for name in named.values() if isinstance(name, str) and "--" not in name}
    files = sorted(f"{module.replace('.', '/')}.py" for module in modules if module)
    return next((file for file in files if not (base / file).is_file()), None)


def copy_rest(base: Path, output: Path) -> None:
    """Copy all that makes `base` a checkpoint beside its weights, byte for byte. Raises `OSError`."""
    found = {path for pattern in _COPIED for path in base.glob(pattern) if path.is_file()}
    for path in sorted(found):
        inside = path.relative_to(base)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        if hidden or path.name.endswith(".index.json"):
            continue
        (output / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, output / inside)


@contextmanager
def whole(output: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `output` if all goes well and vanishes otherwise. Raises `ConfigError`."""
    partial = output.with_name(f".{output.name}.partial_{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()  # fails where somebody else has such a folder, which is not deleted then
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error}") from error
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        os.replace(partial, output)  # an empty folder gives way, any other does not
        flush(output.parent)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
