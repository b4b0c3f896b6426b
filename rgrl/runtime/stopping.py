"""Requests to end a run before its last step: SIGTERM, SIGUSR1, Ctrl-C, and the end of `run.max_hours`.

A request is only recorded. The trainer looks at the end of each rollout and of each step and sums requests over all
ranks, so every rank stops at the same place, even where a scheduler told only one of them. To add a signal, add its
name to `SIGNALS`.
"""

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
REASONS = (*SIGNALS, "run.max_hours")  # the first that applies counts: a person's Ctrl-C, whatever a launcher adds
SAID = b"\nstopping: the rollout or update under way is finished and saved; Ctrl-C again ends the run at once\n"


class StopRequests:
    """Context in which signals are recorded instead of obeyed. Counts time from its creation, on a monotonic clock.

    Outside the main thread, where Python delivers no signals, it only watches the time. A second Ctrl-C is obeyed as it
    would be outside: it ends `rgrl train`, and raises `KeyboardInterrupt` in a program of the user's own. Where Ctrl-C
    is ignored, as in a shell's background jobs, it stays so.
    """

    def __init__(self, max_hours: float) -> None:
        self._end = time.monotonic() + max_hours * 3600 if max_hours else None
        self._seen: set[str] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)  # SIGUSR1 is not everywhere
                ignored = name == "SIGINT" and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
                if number is not None and not ignored:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in self._before:
            self._restore(number)

    def _restore(self, number: int) -> None:
        handler = self._before[number]
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: not one of Python's

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._seen.add(signal.Signals(number).name)
        if number == signal.SIGINT:
            self._restore(number)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                with contextlib.suppress(OSError):
                    os.write(2, SAID)  # not `print`, which may be what was interrupted

    def asked(self) -> list[int]:
        """1 for each of `REASONS` that applies to this process, else 0."""
        if self._end is not None and time.monotonic() >= self._end:
            self._seen.add("run.max_hours")
        return [int(name in self._seen) for name in REASONS]


def first_reason(counts: list[int]) -> str | None:
    """The first of `REASONS` that applies to any rank, given the ranks' `asked()` summed."""
    return next((name for name, count in zip(REASONS, counts, strict=True) if count), None)
