"""Which checkpoint a run goes on from, and whether its folder is its own."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rgrl.checkpoint.content import check_content, progress_of
from rgrl.checkpoint.format import checkpoints, damage, own_checkpoints, owns_checkpoint, owns_latest, run_of, step_of
from rgrl.config import Config
from rgrl.console import warn
from rgrl.errors import ConfigError
from rgrl.folder import Owner, in_the_way, new_owner, not_ours, owner_of
from rgrl.runtime.lock import only_trainer
from rgrl.runtime.stopping import REASONS
from rgrl.tracking import read_metrics
from rgrl.tracking.tables import owns_table, tables_after

HEADER = "# All settings, written by rgrl whenever this run starts or goes on: run "  # the first line of config.yaml
T = TypeVar("T")


def check_writable(output_dir: Path) -> None:
    """Raise `ConfigError` unless `output_dir` is a writable folder, or can become one."""
    try:
        nearest = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    except OSError as error:
        raise ConfigError(f"`run.output_dir` {output_dir} cannot be written: {error.strerror}") from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"`run.output_dir` {output_dir}: {nearest} is not a folder to write in")


def take_folder(config: Config, accelerator: Accelerator, held: ExitStack) -> tuple[Path | None, Owner]:
    """Lock the output folder until `held` is left, and say what to resume from (None: nothing) and whose folder it is.

    Collective; raises `ConfigError`. Only the main process locks and looks, so that all go on alike.
    """

    def look() -> tuple[Path | None, Owner]:
        output = Path(config.run.output_dir)
        held.enter_context(only_trainer(output))
        return choose(config.run.resume_from_checkpoint, output)

    return _on_main(accelerator, look)


def find_checkpoint(config: Config, accelerator: Accelerator) -> Path | None:
    """The whole checkpoint to read; None for `auto` where there is none. Collective; raises `ConfigError`."""

    def look() -> Path | None:
        output, wanted = Path(config.run.output_dir), config.run.resume_from_checkpoint
        if wanted not in ("latest", "auto", None):
            return _given(Path(wanted))
        owner = owner_of(output)
        found = checkpoints(output) if owner is None else own_checkpoints(output, owner)
        return _newest(output, found) if found or wanted != "auto" else None

    return _on_main(accelerator, look)


def _on_main(accelerator: Accelerator, look: Callable[[], T]) -> T:
    """What `look` finds, or raises as `ConfigError`, on the main process: for all."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = look()
        except ConfigError as error:
            answer[1] = str(error)
        except OSError as error:
            answer[1] = f"`run.output_dir` or `run.resume_from_checkpoint` cannot be read: {error}"
    found, complaint = broadcast_object_list(answer)
    if complaint is not None:
        raise ConfigError(complaint)
    return found


def choose(wanted: str | None, output: Path) -> tuple[Path | None, Owner]:
    """What to resume from and whose the folder is then. Raises `ConfigError`, also for what would be in the way."""
    owner = owner_of(output)
    found = checkpoints(output) if owner is None else own_checkpoints(output, owner)
    if wanted == "latest" or (wanted == "auto" and found):
        resume = _newest(output, found)
    elif wanted in (None, "auto"):
        if wanted is None and (owner is not None or found):
            _refuse_to_start_over(output, found)
        resume = None
    else:
        resume = _given(Path(wanted))
    inside = resume is not None and resume.parent.resolve() == (output / "checkpoints").resolve()
    if owner is None and inside:
        assert resume is not None
        run = run_of(resume)
        owner = replace(new_owner(), older=True) if run is None else Owner(run)
    elif owner is None:
        if (name := in_the_way(output)) is not None:
            raise ConfigError(
                f"`run.output_dir` {output} holds `{name}`, and no run to go on with wrote it: choose another folder"
            )
        owner = new_owner()
    elif resume is not None and not (inside and owner.older) and run_of(resume) != owner.id:
        if started(output, found):
            raise ConfigError(
                f"{resume} is not of the run in `run.output_dir` {output}: choose another folder to go on from it, or "
                "pass --run.resume_from_checkpoint latest to go on with that run"
            )
    check_free(output, owner, 0 if resume is None else progress_of(resume).step)
    return resume, owner


def started(output: Path, found: list[Path]) -> bool:
    """Whether the run in a folder, with the checkpoints `found`, has taken an update that is on disk."""
    lines = read_metrics(output / "metrics.jsonl")
    return any(step_of(folder) > 0 for folder in found) or any(line["step"] > 0 for line in lines)


def _refuse_to_start_over(output: Path, found: list[Path]) -> None:
    """Raise `ConfigError` where a run has taken an update."""
    if any(step_of(folder) > 0 for folder in found):
        raise ConfigError(
            f"`run.output_dir` {output} already holds a run: pass --run.resume_from_checkpoint latest to go on "
            "with it, or choose another folder"
        )
    if started(output, found):
        raise ConfigError(
            f"`run.output_dir` {output} already holds a run, stopped before its first checkpoint: delete it, "
            "choose another folder, or start over with --run.resume_from_checkpoint auto"
        )


def check_free(output: Path, owner: Owner, step: int) -> None:
    """Refuse to begin after `step` where a file that will be replaced is not the run's own. Raises `ConfigError`."""
    folders = [path for path in checkpoints(output) if step_of(path) > step and not owns_checkpoint(path, owner)]
    found = [
        *(path for path in (output / "config.yaml",) if not owns_settings(path, owner)),
        *(path for path in (output / "requeue",) if not owns_request(path)),
        *(path for path in (output / "checkpoints" / "latest",) if not owns_latest(path)),
        *(folder for folder in folders if any(folder.iterdir())),
        *(path for path in tables_after(output, step) if not owns_table(path, owner)),
    ]
    if found:
        raise ConfigError(f"`run.output_dir`: {not_ours(found[0])}")


def owns_settings(path: Path, owner: Owner) -> bool:
    """Whether a folder's config.yaml is the run's, or nothing yet."""
    try:
        first = path.read_bytes().partition(b"\n")[0].decode(errors="replace")
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return owner.owns(first.removeprefix(HEADER) if first.startswith(HEADER) else None)


def owns_request(path: Path) -> bool:
    """Whether a folder's file `requeue` is a run's, or nothing yet."""
    try:
        return path.read_bytes().decode(errors="replace").removesuffix("\n") in REASONS
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _newest(output: Path, found: list[Path]) -> Path:
    """The newest whole one of these checkpoints. Raises `ConfigError`."""
    if not found:
        raise ConfigError(f"nothing to resume: no checkpoint of this run in {output / 'checkpoints'}")
    problems: list[str] = []
    for folder in reversed(found):
        problem = damage(folder)
        if problem is None:
            if problems:
                warn(f"damaged: {'; '.join(problems)}; resuming from the newest whole checkpoint, {folder}")
            check_content(folder)
            return folder
        problems.append(f"{folder}: {problem}")
    raise ConfigError(f"nothing to resume: no whole checkpoint in {output / 'checkpoints'} ({'; '.join(problems)})")


def _given(folder: Path) -> Path:
    """A checkpoint by its folder, whole. Raises `ConfigError`."""
    if not folder.is_dir():
        raise ConfigError(f"`run.resume_from_checkpoint` {folder} is not a checkpoint folder")
    if problem := damage(folder):
        raise ConfigError(f"cannot resume {folder}, it is damaged: {problem}")
    check_content(folder)
    return folder
