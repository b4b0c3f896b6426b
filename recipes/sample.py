"""`rgrl sample` as a script: python recipes/sample.py --config FILE [--section.key VALUE ...]"""

import sys

from rgrl.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
