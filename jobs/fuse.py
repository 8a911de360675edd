"""Fuse the labels of several teachers over the same tiles into one store, beside the first.

ray job submit --working-dir . -- python jobs/fuse.py /shared/runs/demo/label-a-* /shared/runs/demo/label-b-*

--weights 2 1 gives each teacher its weight, in the order of the stores.
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["fuse", *sys.argv[1:]]))
