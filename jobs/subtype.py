"""Split a class of a store into finer ones by what its boxes show, into a store beside it.

ray job submit --working-dir . -- python jobs/subtype.py /shared/runs/demo/label-a-* --class car --by colour

With --by classifier and --by prompts, a model looks at the crops; --model names it.
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["subtype", *sys.argv[1:]]))
