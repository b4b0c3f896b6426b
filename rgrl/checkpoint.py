"""Save a run's state while it goes on, and load only what is whole.

A checkpoint is a folder `checkpoints/step_000100/` with `adapter/` in peft's own format, `state.pt` (optimizer,
global random state of each rank), `progress.json`, `config.yaml`, `about.json` (processes, prompts and
library versions it was made with) and `manifest.json`, which has the size and the SHA-256 of every other file. It is
written under another name, flushed to the disk and renamed, and then the file `checkpoints/latest` is replaced by one
that names it. So a folder of this name is whole unless somebody or the disk changed it, which the manifest tells.
"""

import functools
import hashlib
import importlib.metadata
import io
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

import rgrl
from rgrl.config import Config, ConfigError, to_dict
from rgrl.models import Policy
from rgrl.seeds import global_state, seed_globals, set_global_state
from rgrl.tracking import warn

_NAME = re.compile(r"step_(\d{6,})")
# What a resumed run must share with the run it goes on from, or its numbers would mean something else.
_FIXED = ("model", "lora", "data", "rollout.num_generations", "run.seed")
_FILES = {
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "state.pt",
    "progress.json",
    "config.yaml",
    "about.json",
}


@dataclass
class Progress:
    """How far a run is. Everything else about its future follows from the config and these."""

    step: int = 0
    num_tokens: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A run's state between two steps, copied to CPU memory, where training does not change it any more."""

    adapter: dict[str, torch.Tensor]
    adapter_config: dict[str, Any]
    state: dict[str, Any]  # `optimizer`, and `rng`, a list with one state a rank
    progress: Progress
    about: dict[str, Any]


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders in `output_dir` that are named as checkpoints, oldest first."""
    found = [p for p in (output_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file is there as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is missing or damaged"
    if missing := sorted(_FILES - expected.keys()):
        return f"manifest.json does not list {missing[0]}"
    for name, (size, digest) in sorted(expected.items()):
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes and not {size}"
            with (folder / name).open("rb") as handle:
                changed = hashlib.file_digest(handle, "sha256").hexdigest() != digest
        except OSError as error:
            return f"{name} is missing or cannot be read ({error.strerror})"
        if changed:
            return f"{name} is not what was written: its SHA-256 is another"
    return None


def check_writable(output_dir: Path) -> None:
    """Raise `ConfigError` unless `output_dir` is a folder to write in, or can become one."""
    nearest = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"`run.output_dir` {output_dir}: {nearest} is not a folder to write in")


def find_checkpoint(config: Config, accelerator: Accelerator) -> Path | None:
    """The whole checkpoint to resume from, None for a fresh start. Collective; raises `ConfigError`.

    The main process looks for all, so that no two go on from different ones.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = _choose(config.run.resume_from_checkpoint, Path(config.run.output_dir))
        except ConfigError as error:
            answer[1] = str(error)
    folder, complaint = broadcast_object_list(answer)
    if complaint is not None:
        raise ConfigError(complaint)
    return folder


def _choose(wanted: str | None, output: Path) -> Path | None:
    found = checkpoints(output)
    if wanted is None or (wanted == "auto" and not found):
        if wanted is None and found:
            raise ConfigError(
                f"`run.output_dir` {output} already holds a run: pass --run.resume_from_checkpoint latest to go on "
                "with it, or choose another folder"
            )
        if wanted is None and (output / "metrics.jsonl").exists():
            raise ConfigError(
                f"`run.output_dir` {output} already holds a run, stopped before its first checkpoint: delete it, "
                "choose another folder, or start over with --run.resume_from_checkpoint auto"
            )
        return None
    if wanted in ("latest", "auto"):
        if not found:
            raise ConfigError(f"nothing to resume: no checkpoint in {output / 'checkpoints'}")
        problems = []
        for folder in reversed(found):
            problem = damage(folder)
            if problem is None:
                if problems:
                    warn(f"damaged: {'; '.join(problems)}; resuming from the newest whole checkpoint, {folder}")
                return folder
            problems.append(f"{folder}: {problem}")
        raise ConfigError(f"nothing to resume: no whole checkpoint in {output / 'checkpoints'} ({'; '.join(problems)})")
    folder = Path(wanted)
    if not folder.is_dir():
        raise ConfigError(f"`run.resume_from_checkpoint` {wanted} is not a checkpoint folder")
    if problem := damage(folder):
        raise ConfigError(f"cannot resume {folder}, it is damaged: {problem}")
    return folder


def check_compatible(folder: Path, config: Config, ranks: int | None, keys: tuple[str, ...] = _FIXED) -> None:
    """Refuse to go on with settings `keys` other than the saved ones, naming both values. Raises `ConfigError`.

    With a number of `ranks`, also refuse another number of prompts a step: where in the data a step is follows from it.
    """
    saved = _read(folder / "config.yaml", lambda path: yaml.safe_load(path.read_text(encoding="utf-8")))
    now = to_dict(config)
    for key in keys:
        before, after = _get(saved, key), _get(now, key)
        if before != after:
            raise ConfigError(f"cannot resume {folder}: `{key}` was {before} and is now {after}")
    if ranks is None:
        return
    processes, per_device = _about(folder)["processes"], _get(saved, "run.prompts_per_device")
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


def check_prompts(folder: Path, fingerprint: str) -> None:
    """Refuse to go on with other training prompts than the saved run's. Raises `ConfigError`."""
    before = _about(folder)["prompts"]
    if before != fingerprint:
        raise ConfigError(f"cannot resume {folder}: `data.path` held {before} and now holds {fingerprint}")


def _about(folder: Path) -> dict[str, Any]:
    return _read(folder / "about.json", lambda path: json.loads(path.read_text(encoding="utf-8")))


def _get(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


class Saver:
    """Saves checkpoints behind a run that goes on: `save` copies the state, and a thread writes the copy.

    A thread, because hashing, writing and flushing leave the interpreter free, and another process would need the
    copy once more. One checkpoint at a time; an interpreter that ends waits for it. Only the main process writes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failure: str | None = None  # why a checkpoint could not be written, until somebody takes it
        self._unexpected: BaseException | None = None
        self._thread: threading.Thread | None = None

    def save(
        self,
        accelerator: Accelerator,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        prompts: str,
        lines_written: bool,
    ) -> None:
        """Start to write `checkpoints/step_N`, after the one before it is written. Collective.

        `prompts` is the fingerprint of the training prompts. `lines_written` tells whether the metrics up to here are
        on the disk: a checkpoint without them would make a resumed run lack a line, so none is written.
        """
        snapshot = take_snapshot(accelerator, policy, optimizer, progress, prompts)
        if not accelerator.is_main_process:
            return
        self.wait()
        if lines_written:
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
            self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write(self.config, snapshot)
        except OSError as error:
            self.failure = f"cannot write checkpoint {snapshot.progress.step}: {error}"
        except BaseException as error:  # raised again where somebody sees it
            self._unexpected = error

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._unexpected is not None:
            raise self._unexpected


def take_snapshot(
    accelerator: Accelerator, policy: Policy, optimizer: torch.optim.Optimizer, progress: Progress, prompts: str
) -> Snapshot:
    """A copy of the state that nothing shares memory with. Collective: every rank's random state is in it."""
    assert policy.peft_model is not None
    adapter = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in _adapter_of(policy).items()}
    config = policy.peft_model.peft_config["default"].to_dict() | {"inference_mode": True}
    rng = gather_object([global_state()])  # everywhere, as there is no way to only send it
    about = {"processes": accelerator.num_processes, "prompts": prompts, "versions": _versions()}
    state = {"optimizer": _packed(optimizer), "rng": rng}
    return Snapshot(adapter, config, state, replace(progress), about)


def _adapter_of(policy: Policy) -> dict[str, torch.Tensor]:
    """The adapter by peft's names."""
    assert policy.peft_model is not None
    trained = {name: p for name, p in policy.peft_model.named_parameters() if p.requires_grad}
    return get_peft_model_state_dict(policy.peft_model, state_dict=trained, save_embedding_layers=False)


def _packed(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """AdamW's settings and, after the first update, its state: one flat tensor for each kind of number.

    Hundreds of small tensors take a multiple of the time to write, which the next step would feel.
    """
    saved = optimizer.state_dict()
    kinds = next(iter(saved["state"].values()), {})
    flat = {kind: torch.cat([s[kind].reshape(-1) for s in saved["state"].values()]).cpu() for kind in kinds}
    return flat | {"param_groups": saved["param_groups"]}


def _unpack(packed: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Put such a state back; settings follow the optimizer's own."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {i: {} for i in range(len(parameters))} if len(packed) > 1 else {}
    for kind in packed.keys() - {"param_groups"}:
        shapes = [torch.Size() if kind == "step" else p.shape for p in parameters]
        pieces = packed[kind].split([shape.numel() for shape in shapes])
        for i, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
            state[i][kind] = piece.view(shape).clone()
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@functools.cache
def _versions() -> dict[str, str]:
    libraries = ("torch", "transformers", "accelerate", "peft")
    return {"rgrl": rgrl.__version__} | {name: importlib.metadata.version(name) for name in libraries}


def give_up_after(resume: Path, step: int, output: Path) -> None:
    """Take their names from the checkpoints in `output` that do not lead to `resume`, which is of this step.

    Or a run that is killed before it saves again would go on from them, though their metrics are dropped. They are
    deleted with the next save, so until then somebody who did not mean it can rename them back. Raises `OSError`.
    """
    later = [path for path in checkpoints(output) if _step(path) >= step and path.resolve() != resume.resolve()]
    for folder in later:
        _set_aside(folder)
    if later:
        _flush(output / "checkpoints")
        names = ", ".join(path.name for path in later)
        warn(f"going back to {resume}: {names} of this run are set aside, and deleted when it saves again")


def write(config: Config, snapshot: Snapshot) -> Path:
    """Write `checkpoints/step_N` and keep the newest `run.keep_checkpoints` up to it. Raises `OSError`.

    Later ones are of a run that was given up for an older checkpoint, as are the metrics it had after that.
    """
    output = Path(config.run.output_dir)
    root, step = output / "checkpoints", snapshot.progress.step
    final, partial = root / f"step_{step:06d}", root / f".partial_{step:06d}"
    root.mkdir(parents=True, exist_ok=True)
    _clear(root)
    try:
        (partial / "adapter").mkdir(parents=True)
        files = {}
        for name, content in _contents(config, snapshot):
            _put(partial / name, content)
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        _put(partial / "manifest.json", _json({"files": files}))
        for folder in (partial / "adapter", partial):
            _flush(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # others may need its room
        raise
    for later in checkpoints(output):
        # Also this step itself, which a run that went back to an older checkpoint passes again.
        if _step(later) >= step:
            _set_aside(later)
    os.replace(partial, final)
    _flush(root)
    _put(root / ".latest", f"{final.name}\n".encode())
    os.replace(root / ".latest", root / "latest")
    _flush(root)
    for old in checkpoints(output)[: -config.run.keep_checkpoints]:
        _set_aside(old)
    _clear(root)
    return final


def _contents(config: Config, snapshot: Snapshot) -> Iterator[tuple[str, bytes | memoryview]]:
    """Name and content of each file, made one after another.

    In memory, so that what is written is what was hashed, and a full disk is an `OSError` whoever made the format.
    """
    yield "adapter/adapter_model.safetensors", safetensors_bytes(snapshot.adapter, {"format": "pt"})
    yield "adapter/adapter_config.json", _json(snapshot.adapter_config)
    buffer = io.BytesIO()
    torch.save(snapshot.state, buffer)
    yield "state.pt", buffer.getbuffer()
    yield "progress.json", _json(asdict(snapshot.progress))
    yield "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False).encode()
    yield "about.json", _json(snapshot.about)


def _json(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, indent=2, sort_keys=True, default=sorted).encode()  # `default`: peft has sets


def _put(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def _set_aside(folder: Path) -> None:
    """Take a checkpoint's name from it: a kill while it is being deleted must not leave half of it under that name."""
    os.replace(folder, folder.with_name(f".partial_{folder.name}"))


def _clear(root: Path) -> None:
    for leftover in root.glob(".partial_*"):
        shutil.rmtree(leftover, ignore_errors=True)  # a file that somebody reads over NFS cannot go yet


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_adapter(folder: Path, policy: Policy) -> None:
    """Put a checkpoint's adapter into the policy; every tensor must be there. Raises `ConfigError`."""
    assert policy.peft_model is not None
    adapter = _read(folder / "adapter" / "adapter_model.safetensors", load_file)
    found = {(name, tuple(t.shape)) for name, t in adapter.items()}
    own = _adapter_of(policy)
    if odd := sorted(found ^ {(name, tuple(t.shape)) for name, t in own.items()}):
        raise ConfigError(f"cannot resume {folder}: its adapter does not fit this model (first difference: {odd[0]})")
    set_peft_model_state_dict(policy.peft_model, adapter)


def load(
    folder: Path, accelerator: Accelerator, policy: Policy, optimizer: torch.optim.Optimizer, seed: int
) -> Progress:
    """Restore everything `Saver` wrote; the rate and the weight decay follow the config. Raises `ConfigError`.

    The global random state belongs to a rank. Where their number is another, each starts one anew from `seed`, the
    step and its own number; what decides anything in this package belongs to prompts and is the same either way.
    """
    load_adapter(folder, policy)
    state = _read(folder / "state.pt", lambda path: torch.load(path, weights_only=True, map_location="cpu"))
    _unpack(state["optimizer"], optimizer)
    progress = _read(folder / "progress.json", lambda path: Progress(**json.loads(path.read_text(encoding="utf-8"))))
    if len(state["rng"]) == accelerator.num_processes:
        set_global_state(state["rng"][accelerator.process_index])
    else:
        seed_globals(seed, progress.step, accelerator.process_index)
    if accelerator.is_main_process:
        before = _about(folder)["versions"]
        for name, now in _versions().items():
            if before[name] != now:
                warn(f"{folder} was saved with {name} {before[name]}, this is {now}: last digits may differ")
    return progress


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, EOFError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot resume: {path} is missing or damaged ({type(error).__name__})") from error
    except (SafetensorError, pickle.UnpicklingError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot resume: {path} is damaged ({type(error).__name__})") from error
