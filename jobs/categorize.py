r"""Look for every class of a vocabulary, and report what is in the imagery.

ray job submit --working-dir . -- python jobs/categorize.py --config demo \
    --vocabulary words.txt --set label.open_vocabulary.model=google/owlvit-base-patch32 --run-dir /shared/runs/demo
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["categorize", *sys.argv[1:]]))
