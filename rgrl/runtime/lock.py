"""One trainer a folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rgrl.console import warn
from rgrl.errors import ConfigError

NAME = ".rgrl_lock"
_held: set[int] = set()  # descriptors, whose locks end with them


def _let_go() -> None:
    """In a forked child: the lock is its parent's, and must not live on in what a reward has left behind."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def only_trainer(output: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if need be. Raises `ConfigError` where another process holds it.

    The kernel ends the lock with the process, however that ends. The lock file, and the folder if it is still empty, go
    when the body is left. Warns where the file system has no locks.
    """
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = _take(output / NAME)
    except OSError as error:
        _remove(made)
        raise ConfigError(f"`run.output_dir` {output} cannot be written: {error}") from error
    _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:  # not in a forked child
            (output / NAME).unlink(missing_ok=True)  # while it is locked, so that nobody else has it by this name
            _held.remove(handle)
            os.close(handle)
            _remove(made)


def _take(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.read(handle, 300).decode(errors="replace").strip()
                os.close(handle)
                raise ConfigError(
                    f"`run.output_dir` {path.parent}: another trainer is at work there ({holder or 'just started'}): "
                    "wait for its end, or choose another folder"
                ) from error
            warn(
                f"the file system of {path.parent} has no locks ({error.strerror}): nothing keeps a second trainer out "
                "of this folder, so start none"
            )
        if _is(path, handle):
            if os.pread(handle, 8, 0) not in (b"", b"process "):
                os.close(handle)
                raise FileExistsError(f"{path} is there already, and no trainer wrote it: move it away")
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return handle
        os.close(handle)  # it was another trainer's, which has ended and removed it


def _is(path: Path, handle: int) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove(folders: list[Path]) -> None:
    """Remove folders as far as they are empty, the innermost first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
