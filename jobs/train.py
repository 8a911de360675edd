"""Train a student on a split's truth or on its soft labels.

ray job submit --working-dir . -- python jobs/train.py --config demo --run-dir /shared/runs/demo

Choose the split and the labels with --set train.split=train_1 --set train.labels=truth (or soft).
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
