"""Evaluate: accelerate launch recipes/evaluate.py --config recipes/NAME/FILE.yaml [--section.key value ...]

Prints the `eval/*` metrics of unguided completions as one JSON object: of the adapter named by
--run.resume_from_checkpoint (latest, or a folder), or of the base model without it.
"""

import json

from rgrl.cli import run
from rgrl.config import Config
from rgrl.trainer import evaluate_checkpoint


def main(config: Config) -> None:
    metrics, is_main = evaluate_checkpoint(config)
    if is_main:
        print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    run(main, __doc__)
