"""What the commands in recipes/ share: arguments, and errors that are one line and exit code 2."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable

import transformers

from rgrl.config import Config, ConfigError, load_config


def run(command: Callable[[Config], object], description: str) -> None:
    """Parse `--config FILE [--section.key value ...]`, call `command`, and turn `ConfigError` into exit code 2."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="any setting of rgrl/config.py can follow as --section.key value",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file with the settings")
    known, overrides = parser.parse_known_args()
    transformers.utils.logging.disable_progress_bar()  # loading takes no time worth a bar; the run's own bar follows
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        command(load_config(known.config, overrides))
    except ConfigError as error:
        if error.on_one_rank or os.environ.get("RANK", "0") == "0":  # one line, not one a process
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
