"""A user's own code: found by name or dotted path, and called at arm's length.

Whatever it raises becomes one line with its file and line, and what it changes of the process is put back. What it can
do besides, such as ending the process with `os._exit`, nothing here prevents: it is trusted not to.
"""

import importlib
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from rgrl.errors import ConfigError

T = TypeVar("T")
_OURS = str(Path(__file__).parent) + os.sep
_LIBRARIES = tuple({str(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "purelib", "platlib")})


class ForeignError(Exception):
    """A user's own code raised, whatever it was: the message names error, file and line. It is the cause of this."""


def resolve(path: str, what: str, known: dict[str, Any] | None = None) -> Any:
    """The entry of `known` called `path`, or the attribute at `package.module:attribute`. Raises `ConfigError`."""
    if known and path in known:
        return known[path]
    names = (
        f"; known: {', '.join(known)}, or package.module:attribute" if known else "; expected package.module:attribute"
    )
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"unknown {what} {path!r}{names}")
    try:
        return at_arms_length(lambda: getattr(importlib.import_module(module), attribute))
    except ForeignError as failure:
        error = failure.__cause__
        found = getattr(sys.modules.get(module), "__file__", None)
        # A module of the same name that was found first is what somebody would look for in vain.
        where = f" (it is {found})" if isinstance(error, AttributeError) and found and found not in str(failure) else ""
        raise ConfigError(f"{what} {path!r} cannot be imported: {failure}{where}") from error


def is_own(path: str, known: dict[str, Any]) -> bool:
    """Whether `resolve` finds a user's own code there."""
    return path not in known


def at_arms_length(
    action: Callable[[], T],
    limit: AbstractContextManager[None] | None = None,
    passing: tuple[type[BaseException], ...] = (),
) -> T:
    """What `action` returns, which calls a user's own code, inside the context `limit`.

    Put back afterwards: the folder, signal handlers, blocked signals and the alarm, torch's grad mode, default type and
    device, autocast and number of threads, `sys.stdout` and `sys.stderr`. A child process that the code forked and that
    comes back ends here. Raises `ForeignError` for anything that the code raises itself, `SystemExit` and
    `KeyboardInterrupt` too, but for the classes in `passing`; and what a signal's handler of ours raised, such as on
    Ctrl-C, whatever became of it in the code.
    """
    raised: list[BaseException] = []  # by handlers of signals
    try:
        with _folder(), _signals(raised), _torch_state(), _streams(), limit or nullcontext(), _children_end():
            result = action()
    except passing:
        if not raised:
            raise
    except BaseException as error:  # a user's code may raise anything
        if not raised:
            raise ForeignError(told(error)) from error
    if raised:
        raise raised[0]
    return result


def told(error: BaseException) -> str:
    """An error in one line: its class, what it says, and where in a user's own code it came from, if from there."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # its own `__str__` is a user's code too
        text = "an error that cannot be printed"
    if isinstance(error, SyntaxError) and error.filename is not None:
        text = str(error.msg)
        place: tuple[str, int | None] | None = (error.filename, error.lineno)
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_OURS, "<frozen"))]
        own = [f for f in frames if not f.filename.startswith((*_LIBRARIES, "<"))]  # "<": made at run time
        last = own[-1] if own else None
        if last is None and frames and not isinstance(error, ImportError):
            last = frames[-1]
        place = (last.filename, last.lineno) if last is not None else None
    shown = text if len(text) <= 500 else f"{text[:500]} ..."
    where = f" ({place[0]}, line {place[1]})" if place is not None else ""
    return f"{type(error).__name__}{f': {shown}' if shown else ''}{where}"


# ------------------------------------------------------------------------------------------------ put back
@contextmanager
def _folder() -> Iterator[None]:
    """Come back to the working folder, also where it was renamed or deleted meanwhile."""
    before = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))  # a folder that may only be passed through will do
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


@contextmanager
def _signals(raised: list[BaseException]) -> Iterator[None]:
    """Put handlers, blocked signals and the alarm back, and note in `raised` what the handler of Ctrl-C raises.

    That tells a user's Ctrl-C from a `KeyboardInterrupt` of the code's own. Only the main thread has handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    alarm = signal.setitimer(signal.ITIMER_REAL, 0)
    interrupt = before[signal.SIGINT]

    def noting(number: int, frame: FrameType | None) -> None:
        try:
            handler: Any = before[signal.SIGINT]
            handler(number, frame)
        except BaseException as error:
            raised.append(error)
            raise
        finally:
            # Ours puts another in its own place, so that a second Ctrl-C is obeyed: here too, and from now on.
            if (now := signal.getsignal(number)) is not noting:
                before[signal.SIGINT] = now
                if callable(now):
                    signal.signal(number, noting)

    try:
        if callable(interrupt):
            signal.signal(signal.SIGINT, noting)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *alarm)
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:  # None: not one of Python's
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def _torch_state() -> Iterator[None]:
    """Put back what decides types, places, gradients and last digits of everything computed after."""
    grad, dtype, device, threads = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
    )
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
    try:
        with torch.inference_mode(torch.is_inference_mode_enabled()):  # ends one that was entered and not left
            torch.set_grad_enabled(grad)
            yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for kind, on in autocast.items():
            if torch.is_autocast_enabled(kind) != on:
                torch.set_autocast_enabled(kind, on)


@contextmanager
def _streams() -> Iterator[None]:
    out, err = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


@contextmanager
def _children_end() -> Iterator[None]:
    """End a process that was forked in the body where it comes out of it: two would go on with one run's files."""
    process, code = os.getpid(), 0
    try:
        yield
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except BaseException:
        code = 1
        if os.getpid() != process:
            traceback.print_exc()
        raise
    finally:
        if os.getpid() != process:
            os._exit(code & 0xFF)
