"""Compare ways to train students: plain soft labels, the recipe's methods and truth, over several seeds.

ray job submit --working-dir . -- python jobs/compare.py --config demo --run-dir /shared/runs/demo

If the driver dies, submit the same again: it goes on where it stopped.
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
