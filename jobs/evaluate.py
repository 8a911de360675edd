"""Judge labels against a split's truth.

ray job submit --working-dir . -- python jobs/evaluate.py --config jobs/recipes/overhead.yaml --run-dir /shared/runs/overhead
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
