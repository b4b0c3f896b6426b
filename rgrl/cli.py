"""What the commands in recipes/ share: arguments, and errors that are one line and an exit code.

0: done. 2: bad input. 75: stopped on request, everything saved, to be started again. 1: anything else. `torchrun` and
`accelerate launch` turn every code but 0 into 1.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable

import transformers
from torch.distributed.elastic.multiprocessing.errors import record

from rgrl.config import Config, ConfigError, RunStoppedError, load_config


def run(command: Callable[[Config], object], description: str) -> None:
    """Parse `--config FILE [--section.key value ...]`, call `command`, and turn its errors into exit codes."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="any setting of rgrl/config.py can follow as --section.key value",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file with the settings")
    known, overrides = parser.parse_known_args()
    sys.path.append(os.getcwd())  # where a recipe's own rewards may lie; last, so that nothing there hides a library
    transformers.utils.logging.disable_progress_bar()  # loading takes no time worth a bar; the run's own bar follows
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    main = os.environ.get("RANK", "0") == "0"
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # one line a machine, as what is wrong may be wrong on one of them

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
