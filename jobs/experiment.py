"""The whole experiment: teachers, soft labels, students, numbers, report.

ray job submit --working-dir . -- python jobs/experiment.py --config demo --run-dir /shared/runs/demo
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["experiment", *sys.argv[1:]]))
