"""Label tiles with a teacher's weights, keeping every box above the floor.

ray job submit --working-dir . -- python jobs/label.py --config demo --run-dir /shared/runs/demo

Give the weights with --set label.weights=/shared/weights/teacher.safetensors.
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
