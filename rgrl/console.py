"""Messages for the user, on stderr."""

import sys

from tqdm.auto import tqdm


def warn(text: str) -> None:
    """Print one line to stderr without breaking a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
