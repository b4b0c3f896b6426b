"""What the commands in recipes/ share: arguments, and errors as one line and an exit code.

0: done. 2: bad input. 75: stopped on request, all saved, to be resumed. 1: anything else. `torchrun` and `accelerate
launch` turn every code but 0 into 1.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable

import transformers
from torch.distributed.elastic.multiprocessing.errors import record

from rgrl.config import Config, load_config
from rgrl.errors import ConfigError, RunStoppedError


def run(command: Callable[[Config], object], description: str) -> None:
    """Parse `--config FILE [--section.key value ...]`, call `command`, and turn its errors into exit codes."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="any setting of rgrl/config/schema.py can follow as --section.key value",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file with the settings")
    known, overrides = parser.parse_known_args()
    sys.path.append(os.getcwd())  # for a recipe's own rewards; last, so that nothing there hides a library
    transformers.utils.logging.disable_progress_bar()  # the run has a bar of its own
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    main = os.environ.get("RANK", "0") == "0"
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # one line a machine: the error may be one machine's

    @record  # so that a launcher shows the traceback of the rank that failed first
    def go() -> None:
        try:
            command(load_config(known.config, overrides))
        except ConfigError as error:
            if error.on_one_rank or first:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except RunStoppedError as stopped:
            if main:
                print(f"stopped: {' '.join(str(stopped).split())}", file=sys.stderr)
            sys.exit(stopped.code)

    go()
