"""`rgrl evaluate` as a script: accelerate launch recipes/evaluate.py --config FILE [--section.key VALUE ...]"""

import sys

from rgrl.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
