"""Messages for the user on stderr, and results on stdout. A message that cannot be written never ends a run."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

from rgrl.errors import RunStoppedError


def warn(text: str) -> None:
    """Print one line to stderr without breaking a progress bar."""
    inform(f"warning: {text}")


def inform(text: str) -> None:
    """Print what a command is about to do or has seen to stderr, without breaking a progress bar."""
    with steady():
        tqdm.write(text, file=sys.stderr)


def complain(text: str) -> None:
    """Print why a command ends to stderr."""
    with steady("stderr"):
        print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a result to stdout, on the main process. What its encoding lacks is written with a backslash.

    Raises `RunStoppedError` where it cannot be written. Exits with code 1 where nobody reads it, as in `... | head`.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        print(encodable(text, sys.stdout), file=sys.stdout, flush=True)
    except BrokenPipeError:
        sys.exit(1)
    except (OSError, ValueError) as error:
        raise RunStoppedError(f"standard output cannot be written: {error}") from error


def tell(text: str) -> None:
    """`say` what is worth having and not worth failing for, such as the report at the end of a run."""
    if os.environ.get("RANK", "0") == "0":
        with steady():
            print(text, flush=True)


def encodable(text: str, stream: Any) -> str:
    """The text with what the stream's encoding lacks written with a backslash."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def writes_unicode() -> bool:
    """Whether stdout takes any character as it is."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


class Steady:
    """A stream that takes all that is written to it, whether it arrives or not: on a full disk, closed, or not UTF-8.

    All else is the stream's own.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError, ValueError):  # the second is that of a closed file
            if self._stream is not None:
                self._stream.write(encodable(text, self._stream))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady(*names: str) -> Iterator[None]:
    """Let nothing that the body prints to `stdout` and `stderr`, or only to those named, raise an error.

    Nor what libraries and a user's own code print.
    """
    before = {name: getattr(sys, name) for name in names or ("stdout", "stderr")}
    fill_descriptors()
    for name, stream in before.items():
        setattr(sys, name, stream if isinstance(stream, Steady) else Steady(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)


def fill_descriptors() -> None:
    """Open the null device where a standard stream is closed: the next file would take its number, and its messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(opened, True)


@contextlib.contextmanager
def drained() -> Iterator[None]:
    """Give up what cannot be written by the body's end, which the interpreter would turn into exit code 120."""
    try:
        yield
    finally:
        for number, stream in ((1, sys.__stdout__), (2, sys.__stderr__)):
            if stream is None:
                continue
            try:
                stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
                    stream.flush()
