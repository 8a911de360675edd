"""Say what a store of soft labels holds, and draw its most doubtful tiles, where the scenes can be read.

ray job submit --working-dir . -- python jobs/show.py /shared/runs/demo/label-labels-* --doubtful 48

The page, the pictures and the tiles to correct go into the store's show/, or to --output.
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["show", *sys.argv[1:]]))
