"""A time limit on a user's own Python."""

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rgrl.errors import ConfigError

GRACE = 30.0  # seconds after which a call that cannot be interrupted ends its process


class TimeUpError(BaseException):
    """Raised when the time is up. Not an `Exception`, so that an `except Exception` on the way does not catch it."""


def check_thread(seconds: float) -> None:
    """Raise `ConfigError` where `time_limit` cannot work: outside the main thread, the only one that signals reach."""
    if seconds and threading.current_thread() is not threading.main_thread():
        raise ConfigError("`reward.time_limit` works in the main thread only: set it to 0 to train in another")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeUpError` in the body after `seconds`, wherever Python code or a blocking call has got to; 0: never.

    A signal reaches a loop, a sleep, a socket, a lock and a child process alike and leaves the function in this
    process, with its modules, device memory and random state; a thread could not be ended, and another process would
    not have them. The alarm rings every second until the body gives way. What never returns to the interpreter cannot
    be interrupted: after another `GRACE` seconds a watchdog that needs no interpreter prints where it hangs and ends
    the process with code 1. Raises `ConfigError` as `check_thread` does.
    """
    if not seconds:
        yield
        return
    check_thread(seconds)
    armed = True

    def ring(number: int, frame: FrameType | None) -> None:
        if armed:
            raise TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    try:
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=2)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        try:
            yield
        finally:
            armed = False
    finally:  # also where the alarm rang just before `armed` was cleared
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)
