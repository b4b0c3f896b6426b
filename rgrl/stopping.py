"""When a run is asked to end before its last step: SIGTERM, SIGUSR1, and the end of `run.max_hours`.

A request is only remembered. The trainer looks at the end of each rollout and of each step, adds up over all ranks
who was asked, and so every rank stops at the same place, also where a scheduler told only one of them.
"""

import signal
import threading
import time
from types import FrameType, TracebackType

REASONS = ("SIGTERM", "SIGUSR1", "run.max_hours")


class StopRequests:
    """Within it, signals are remembered and not obeyed. Time is counted from its making, by a clock that only goes on.

    Outside the main thread, where Python delivers no signals, only the time counts.
    """

    def __init__(self, max_hours: float) -> None:
        self._end = time.monotonic() + max_hours * 3600 if max_hours else None
        self._seen: set[str] = set()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for name in REASONS[:2]:
                number = getattr(signal, name, None)  # SIGUSR1 is not everywhere
                if number is not None:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: not one of Python's

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._seen.add(signal.Signals(number).name)

    def asked(self) -> list[int]:
        """1 for each of `REASONS` that this process has met, else 0."""
        if self._end is not None and time.monotonic() >= self._end:
            self._seen.add("run.max_hours")
        return [int(name in self._seen) for name in REASONS]


def first_reason(counts: list[int]) -> str | None:
    """The first of `REASONS` that any rank has met, of the ranks' `asked()` added up."""
    return next((name for name, count in zip(REASONS, counts, strict=True) if count), None)
