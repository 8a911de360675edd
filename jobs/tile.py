"""Cut scenes and truth into tiles.

ray job submit --working-dir . -- python jobs/tile.py --config demo --run-dir /shared/runs/demo
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["tile", *sys.argv[1:]]))
