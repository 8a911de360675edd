"""Search for the threshold that makes the best student: label once, train many students, say how sure the answer is.

ray job submit --working-dir . -- python jobs/search.py --config demo --run-dir /shared/runs/demo

Add --budget 8h for a night; if the driver dies, submit the same with --resume.
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
