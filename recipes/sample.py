"""Sample: python recipes/sample.py --config recipes/NAME/FILE.yaml [--section.key value ...]

Completions of the eval prompts, one JSON line each with its reward, guided as `guidance` says, best of G first.
With --run.resume_from_checkpoint latest (or a folder) the trained adapter writes them, otherwise the base model.
"""

import json

from rgrl.cli import run
from rgrl.config import Config
from rgrl.trainer import sample


def main(config: Config) -> None:
    for row in sample(config):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    run(main, __doc__)
