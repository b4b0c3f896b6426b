"""Evaluate: accelerate launch recipes/evaluate.py --config recipes/NAME/FILE.yaml [--section.key value ...]

Prints the `eval/*` metrics of unguided completions as one JSON object: of the adapter named by
--run.resume_from_checkpoint (latest, or a folder), or of the base model without it.
"""

import json

from rgrl.cli import run
from rgrl.config import Config
from rgrl.runtime.launch import is_main_process
from rgrl.trainer import evaluate


def main(config: Config) -> None:
    result = evaluate(config)
    if is_main_process():
        print(json.dumps(result.metrics, indent=2))


if __name__ == "__main__":
    run(main, __doc__)
