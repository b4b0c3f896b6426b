"""Save a run's state while it goes on."""

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save as safetensors_bytes

from rgrl.checkpoint.format import (
    FORMAT,
    Progress,
    adapter_of,
    checkpoints,
    owns_checkpoint,
    owns_latest,
    pack,
    step_of,
    versions,
)
from rgrl.config import Config, as_yaml
from rgrl.console import warn
from rgrl.distributed import counts
from rgrl.errors import RunStoppedError
from rgrl.folder import Owner, not_ours, replace
from rgrl.models import Policy
from rgrl.models.lora import adapter_parameters
from rgrl.models.names import settings_of, to_original
from rgrl.seeds import global_state


@dataclass(frozen=True)
class Snapshot:
    """A run's state between two steps, copied to CPU memory, where training no longer changes it."""

    adapter: dict[str, torch.Tensor]
    adapter_config: dict[str, Any]
    state: dict[str, Any]  # `optimizer`, and `rng`, a list with one state a rank
    progress: Progress
    about: dict[str, Any]
    owner: Owner  # the run


class Saver:
    """Saves checkpoints in the background: `save` copies the state, and a thread writes the copy.

    A thread, because hashing, writing and flushing release the interpreter lock, and another process would need a
    second copy. One checkpoint at a time, and the trainer waits for the last; a process that ends sooner leaves what a
    kill would. Only the main process writes.
    """

    def __init__(self, config: Config, owner: Owner) -> None:
        self.config, self.owner = config, owner
        self.failure: str | None = None  # why a checkpoint could not be written, until the trainer takes it
        self._unexpected: BaseException | None = None
        self._thread: threading.Thread | None = None

    def save(
        self,
        accelerator: Accelerator,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        fingerprints: dict[str, Any],
        lines_written: bool,
    ) -> None:
        """Start to write `checkpoints/step_N`, after the one before it is written. Collective.

        `fingerprints` are those of the models and the data. `lines_written` tells whether the metrics up to here are on
        disk: after a checkpoint without them a resumed run would lack a line, so none is written. Raises
        `RunStoppedError` where the weights are not finite.
        """
        self.check_weights(accelerator, policy, progress.step)
        snapshot = take_snapshot(accelerator, policy, optimizer, progress, fingerprints, self.owner)
        if not accelerator.is_main_process:
            return
        self.wait()
        if lines_written:
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
            self._thread.start()

    def check_weights(self, accelerator: Accelerator, policy: Policy, step: int) -> None:
        """Raise `RunStoppedError` where the adapter is not finite: nothing good would follow. Collective."""
        adapter = adapter_parameters(policy)
        finite = torch.stack([p.detach().isfinite().all() for p in adapter.values()]).tolist()
        broken = [name for name, holds in zip(adapter, finite, strict=True) if not holds]
        if not counts(accelerator, [len(broken)])[0]:
            return
        self.wait()
        raise RunStoppedError(
            f"the weights after step {step} are not finite ({', '.join(broken[:1]) or 'on another process'}), and are "
            f"not saved; {newest(Path(self.config.run.output_dir))}"
        )

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write(self.config, snapshot)
        except OSError as error:
            self.failure = f"cannot write checkpoint {snapshot.progress.step}: {error}"
        except BaseException as error:  # raised again in `wait`
            self._unexpected = error

    def wait(self) -> None:
        """Return once nothing is being written. Raises what the writer did not expect."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._unexpected is not None:
            raise self._unexpected


def newest(output: Path) -> str:
    """Which checkpoint of a run is the newest, in words."""
    found = checkpoints(output)
    return f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def take_snapshot(
    accelerator: Accelerator,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    fingerprints: dict[str, Any],
    owner: Owner,
) -> Snapshot:
    """A copy of the state that shares no memory with it. Collective: it holds every rank's random state."""
    own = to_original(adapter_of(policy), policy.names)
    adapter = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in own.items()}
    config = settings_of(policy, adapter)
    rng = gather_object([global_state()])  # everywhere, as there is no way to only send it
    about = {"format": FORMAT, "run": owner.id, "processes": accelerator.num_processes, "versions": versions()}
    state = {"optimizer": pack(optimizer), "rng": rng}
    return Snapshot(adapter, config, state, progress, about | fingerprints, owner)


def set_aside_after(resume: Path, step: int, output: Path, owner: Owner) -> None:
    """Set aside the run's checkpoints in `output` newer than `resume`, which is of this step.

    Otherwise a run that is killed before it saves again would resume from them, although their metrics are dropped. The
    next save deletes them; until then a user who did not mean it can rename them back. Raises `OSError`.
    """
    later = [path for path in _own(output, owner) if step_of(path) >= step and path.resolve() != resume.resolve()]
    for folder in later:
        _set_aside(folder, owner)
    if later:
        flush(output / "checkpoints")
        names = ", ".join(path.name for path in later)
        warn(f"going back to {resume}: {names} of this run are set aside, and deleted when it saves again")


def write(config: Config, snapshot: Snapshot) -> Path:
    """Write `checkpoints/step_N` and keep the run's newest `run.keep_checkpoints` up to it. Raises `OSError`.

    Later ones belong to a branch abandoned for an older checkpoint, as do the metrics after it. Nothing that another
    run or a person put there is touched; where it is in the way, nothing is written.
    """
    output, owner = Path(config.run.output_dir), snapshot.owner
    root, step = output / "checkpoints", snapshot.progress.step
    final = root / f"step_{step:06d}"
    partial = root / f".partial_{step:06d}_{owner.id}"
    root.mkdir(parents=True, exist_ok=True)
    _clear(root, owner)
    own = _own(output, owner)
    if _is_there(final) and final not in own:
        raise not_ours(final)
    if not owns_latest(root / "latest"):
        raise not_ours(root / "latest")
    try:
        (partial / "adapter").mkdir(parents=True)
        files = {}
        for name, content in _contents(config, snapshot):
            _put(partial / name, content)
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        _put(partial / "manifest.json", _json({"run": owner.id, "files": files}))
        for folder in (partial / "adapter", partial):
            flush(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # others may need its room
        raise
    for later in own:
        # Also this step itself, which a run that went back to an older checkpoint passes again.
        if step_of(later) >= step:
            _set_aside(later, owner)
    os.replace(partial, final)
    flush(root)
    replace(root / "latest", f"{final.name}\n".encode(), owner)
    flush(root)
    for old in _own(output, owner)[: -config.run.keep_checkpoints]:
        _set_aside(old, owner)
    _clear(root, owner)
    return final


def _own(output: Path, owner: Owner) -> list[Path]:
    """The run's checkpoints, and empty folders that are named so, which hold nothing to lose; oldest first."""
    return [path for path in checkpoints(output) if owns_checkpoint(path, owner) or not any(path.iterdir())]


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _contents(config: Config, snapshot: Snapshot) -> Iterator[tuple[str, bytes | memoryview]]:
    """Name and content of each file, made one after another.

    In memory, so that what is written is what was hashed, and a full disk is an `OSError` in every format.
    """
    yield "adapter/adapter_model.safetensors", safetensors_bytes(snapshot.adapter, {"format": "pt"})
    yield "adapter/adapter_config.json", _json(snapshot.adapter_config)
    buffer = io.BytesIO()
    torch.save(snapshot.state, buffer)
    yield "state.pt", buffer.getbuffer()
    yield "progress.json", _json(asdict(snapshot.progress))
    yield "config.yaml", as_yaml(config).encode()
    yield "about.json", _json(snapshot.about)


def _json(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, indent=2, sort_keys=True, default=sorted).encode()  # `default`: peft has sets


def _put(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def _set_aside(folder: Path, owner: Owner) -> None:
    """Rename a checkpoint before it is deleted: a kill in between must not leave half of it under its name."""
    names = (f".partial_{folder.name}_{owner.id}{f'_{n}' if n else ''}" for n in itertools.count())
    os.replace(folder, next(path for path in map(folder.with_name, names) if not _is_there(path)))


def _clear(root: Path, owner: Owner) -> None:
    """Delete what this run has left half written or set aside. An older version put no id into the names."""
    end = rf"(_{owner.id}(_[0-9]+)?){'?' if owner.older else ''}"
    for leftover in root.glob(".partial_*"):
        if not re.fullmatch(rf"\.partial_(step_)?[0-9]{{6,10}}{end}", leftover.name):
            continue
        if leftover.is_symlink():
            leftover.unlink()
        else:
            shutil.rmtree(leftover, ignore_errors=True)  # NFS keeps a file that another process has open


def flush(path: Path) -> None:
    """Force a file or folder to disk, where a full one says so. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
