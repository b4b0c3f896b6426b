"""A process of its own for checks that may hang: it is asked in writing, and ended where it does not answer in time."""

import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from pathlib import Path

from rgrl.errors import ConfigError

WORKER = Path(__file__).with_name("worker.py")
START = 300.0  # seconds to import sympy and antlr on a busy machine
GRACE = 20.0  # seconds beyond a job's limit, after which the worker itself is taken to hang
MOST_BYTES = 10**6  # of an answer


class LostError(Exception):
    """The worker ended, or no longer answers."""


class Process:
    """`worker.py` at the end of two pipes. Started when it is first asked, and again where it was lost."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.ready: set[str] = set()
        self.number = 0

    def ask(self, kind: str, texts: tuple[str, ...], seconds: float) -> float | None:
        """The worker's answer, None where it had none within `seconds`.

        Raises `ConfigError` where the worker cannot do what it is asked for, such as for a package that is not there.
        """
        for _ in range(2):  # it may have been ended from outside, as by a scheduler that ends every process of a job
            try:
                self._start(kind)
                answer = self._exchange({"kind": kind, "texts": texts, "seconds": seconds}, seconds + GRACE)
            except LostError:
                self.close()
                continue
            except BaseException:  # Ctrl-C: what it answers later would be taken for the next answer
                self.close()
                raise
            value = answer.get("value")
            return float(value) if isinstance(value, int | float) else None
        return None

    def prepare(self, kind: str) -> None:
        """Start the worker and have it import what a kind of job needs. Raises `ConfigError` where it cannot."""
        for _ in range(2):
            try:
                return self._start(kind)
            except LostError:
                self.close()
        raise ConfigError(f"the process of the verifier `{kind}` ends, or does not answer, as soon as it is started")

    def _start(self, kind: str) -> None:
        if self.child is None:
            # -P: its folder must not come before the standard library. A session of its own: Ctrl-C is for the trainer.
            self.child = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                bufsize=0,
            )
            self.ready = set()
            weakref.finalize(self, _end, self.child)
        if kind not in self.ready:
            answer = self._exchange({"kind": "prepare", "texts": [kind], "seconds": START}, START)
            if "failed" in answer:
                self.close()
                raise ConfigError(str(answer["failed"]))
            self.ready.add(kind)

    def _exchange(self, message: dict[str, object], seconds: float) -> dict[str, object]:
        """Send a job and read its answer. Raises `LostError`."""
        assert self.child is not None and self.child.stdin is not None and self.child.stdout is not None
        self.number += 1
        line, until = json.dumps(message | {"id": self.number}).encode() + b"\n", time.monotonic() + seconds
        received, out, into = b"", self.child.stdout.fileno(), self.child.stdin.fileno()
        os.set_blocking(into, False)
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            selector.register(into, selectors.EVENT_WRITE)
            while not received.endswith(b"\n"):
                left = until - time.monotonic()
                if left <= 0 or len(received) > MOST_BYTES:
                    raise LostError
                for key, _ in selector.select(left):
                    try:
                        if key.fd == into:
                            line = line[os.write(into, line) :]
                            if not line:
                                selector.unregister(into)
                        else:
                            part = os.read(out, 65536)
                            if not part:
                                raise LostError
                            received += part
                    except BlockingIOError:
                        continue
                    except OSError as error:
                        raise LostError from error
        answer = json.loads(received)
        if not isinstance(answer, dict) or answer.get("id") != self.number:
            raise LostError
        return answer

    def close(self) -> None:
        """End the worker, if it runs."""
        if self.child is not None:
            _end(self.child)
            self.child = None


def _end(child: "subprocess.Popen[bytes]") -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    if child.poll() is None:
        child.kill()
        child.wait()
