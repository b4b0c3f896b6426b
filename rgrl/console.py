"""Messages for the user on stderr, and results on stdout."""

import os
import sys

from tqdm.auto import tqdm


def warn(text: str) -> None:
    """Print one line to stderr without breaking a progress bar."""
    inform(f"warning: {text}")


def inform(text: str) -> None:
    """Print what a command is about to do or has seen to stderr, without breaking a progress bar."""
    tqdm.write(text, file=sys.stderr)


def say(text: str) -> None:
    """Print a result to stdout, on the main process. Exits with code 1 where nobody reads it, as in `... | head`."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again as it ends
        sys.exit(1)
