"""Train a student on a split's truth or on its soft labels.

ray job submit --working-dir . -- python jobs/train.py --config jobs/recipes/overhead.yaml --run-dir /shared/runs/overhead
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
