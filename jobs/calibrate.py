"""Calibrate the labels' scores, on a split with truth.

ray job submit --working-dir . -- python jobs/calibrate.py --config demo --run-dir /shared/runs/demo

The labels are those that jobs/label.py made with the same recipe and --set label.weights.
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))
