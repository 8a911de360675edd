"""Write a store's labels as GeoParquet, GeoJSON, COCO or a YOLO folder, at any threshold, without labelling again.

ray job submit --working-dir . -- python jobs/export.py /shared/runs/demo/label-labels-* --format geojson

The files go beside the store, or to --output, in a bucket or on storage that every node mounts.
"""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
