"""`rgrl train` as a script: accelerate launch recipes/train.py --config FILE [--section.key VALUE ...]"""

import sys

from rgrl.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
