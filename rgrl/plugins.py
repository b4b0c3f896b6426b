"""User code: found by name or dotted path, and called through one boundary, `call_user_code`.

Whatever it raises becomes one line with its file and line, and it has a time limit. What it changes in the process,
such as the working folder or signal handlers, stays changed: that is the user's program. But what would change numbers
in silence, torch's default type or autocast left on, is an error.
"""

import faulthandler
import importlib
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from rgrl.errors import ConfigError

T = TypeVar("T")
GRACE = 30.0  # seconds after which a call that cannot be interrupted ends its process
_SKIPPED = (str(Path(__file__).parent) + os.sep, "<frozen")
_LIBRARIES = tuple({str(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "purelib", "platlib")})


class UserCodeError(Exception):
    """User code raised an exception, which is the cause of this one, or did not return in time; `reason` says which."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}")
        self.reason = reason


class TimeUpError(BaseException):
    """The time is up. Not an `Exception`, so that an `except Exception` in user code does not catch it."""


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
        return call_user_code(f"{what} {path!r}", lambda: getattr(importlib.import_module(module), attribute))
    except UserCodeError as failure:
        reason, error = failure.reason.removeprefix("raised "), failure.__cause__
        found = getattr(sys.modules.get(module), "__file__", None)
        # Another module of the same name may have been found first.
        where = f" (it is {found})" if isinstance(error, AttributeError) and found and found not in reason else ""
        raise ConfigError(f"{what} {path!r} cannot be imported: {reason}{where}") from error


def is_own(path: str, known: dict[str, Any]) -> bool:
    """Whether `resolve` finds user code there."""
    return path not in known


def call_user_code(name: str, action: Callable[[], T], seconds: float = 0.0) -> T:
    """What `action`, which calls user code, returns; `name` begins the message of an error.

    Raises `UserCodeError` if it raises anything, `SystemExit` included, or does not return within `seconds` (0: no
    limit). Ctrl-C passes through. Raises `ConfigError` where a time limit cannot work: outside the main thread, the
    only one that signals reach.
    """
    if seconds and threading.current_thread() is not threading.main_thread():
        raise ConfigError("`reward.time_limit` works in the main thread only: set it to 0 to train in another")
    before = _torch_state()
    try:
        with time_limit(seconds):
            result = action()
    except KeyboardInterrupt:
        raise
    except TimeUpError:  # where the alarm happened to ring is not of interest
        raise UserCodeError(name, f"did not return within its `time_limit` of {seconds:g} seconds") from None
    except BaseException as error:  # user code may raise anything
        raise UserCodeError(name, f"raised {describe_exception(error)}") from error
    if changed := [what for what, now in _torch_state().items() if before.get(what, now) != now]:
        raise UserCodeError(name, f"left torch's {' and '.join(changed)} changed: put it back before it returns")
    return result


def _torch_state() -> dict[str, Any]:
    """What of torch's global state decides the numbers, or the gradients, of everything computed after."""
    torch: Any = sys.modules.get("torch")
    if torch is None:  # nothing imports torch for this alone
        return {}
    return {
        "grad mode": torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
        "default type": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
    }


def describe_exception(error: BaseException) -> str:
    """An exception in one line: class, message, and file and line, in user code if it passed through any."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # `__str__` may be user code too
        text = "an error that cannot be printed"
    position: tuple[str, int | None] | None = None
    if isinstance(error, SyntaxError) and error.filename is not None:
        text, position = str(error.msg), (error.filename, error.lineno)
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_SKIPPED)]
        users = [f for f in frames if not f.filename.startswith((*_LIBRARIES, "<"))]  # "<": code made at run time
        last = users[-1:] or ([] if isinstance(error, ImportError) else frames[-1:])
        position = (last[0].filename, last[0].lineno) if last else None
    shown = text if len(text) <= 500 else f"{text[:500]} ..."
    where = f" ({position[0]}, line {position[1]})" if position is not None else ""
    return f"{type(error).__name__}{f': {shown}' if shown else ''}{where}"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeUpError` in the body after `seconds` (0: never), in Python code and in blocking calls.

    Main thread only. A signal interrupts a loop, a sleep, a socket, a lock and a child process, and leaves the function
    in this process, with its modules, device memory and random state; a thread could not be ended. The alarm rings
    every second until the body ends. Native code that does not return to the interpreter cannot be interrupted: after
    another `GRACE` seconds a watchdog that needs no interpreter prints where it hangs and ends the process with code 1.
    """
    if not seconds:
        yield
        return
    armed = True

    def ring(number: int, frame: FrameType | None) -> None:
        if armed:
            raise TimeUpError

    handler, timer = signal.signal(signal.SIGALRM, ring), (0.0, 0.0)
    try:
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=2)
        timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        try:
            yield
        finally:
            armed = False
    finally:  # also where the alarm rang just before `armed` was cleared
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, *timer)
