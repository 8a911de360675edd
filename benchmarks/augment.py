"""Are labels better for test-time augmentation, and what does it cost?

python benchmarks/augment.py --weights best.pt --images DIR/images --truth DIR/instances.json --json augment.json

Labels the test split of real images (those of classes that the weights know) as they are and with each set of views:
mAP50 of the labels, precision and recall at the threshold with the best F1 of each and at 0.3, and tiles per second.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from common import machine

from softlabel.detectors import families
from softlabel.detectors.augment import AugmentedDetector
from softlabel.detectors.describe import read_header
from softlabel.detectors.families import Teacher
from softlabel.evaluation.matching import TileResult
from softlabel.evaluation.metrics import evaluate
from softlabel.evaluation.quality import label_quality
from softlabel.records import Nms, Truth

_VIEWS: dict[str, tuple[str | float, ...]] = {
    "as it is": (),
    "fliplr": ("fliplr",),
    "fliplr, flipud": ("fliplr", "flipud"),
    "fliplr, flipud, rot90": ("fliplr", "flipud", "rot90"),
    "1.5": (1.5,),
    "0.75, 1.5": (0.75, 1.5),
    "fliplr, 0.75, 1.5": ("fliplr", 0.75, 1.5),
}
_NMS = Nms(0.01, 0.7, 300)
_THRESHOLD = 0.3


def main() -> int:
    """Measure every set of views and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--truth", type=Path, required=True, help="COCO JSON with a `split` for each image")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    header = read_header(arguments.weights)
    classes = header.classes
    tiles = _test_tiles(arguments.images, arguments.truth, classes)
    teacher = Teacher(header.family, arguments.weights, {}, len(classes), header.imgsz, _NMS, "pytorch", "float32")
    detector = families.load(teacher, threads=None, batch_size=8)
    found: dict[str, Any] = {
        "machine": machine(),
        "tiles": len(tiles),
        "objects": sum(len(truth.boxes) for _, truth in tiles),
    }
    found["views"] = {}
    for name, views in _VIEWS.items():
        looking = AugmentedDetector(detector, views) if views else detector
        found["views"][name] = _measured(looking, tiles, classes)
    print(_table(found["views"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def _test_tiles(images: Path, truth: Path, classes: tuple[str, ...]) -> list[tuple[Any, Truth]]:
    document = json.loads(truth.read_text())
    names = {one["id"]: one["name"] for one in document["categories"]}
    tiles = []
    for image in document["images"]:
        if image["split"] != "test":
            continue
        drawn = [one for one in document["annotations"] if one["image_id"] == image["id"]]
        if drawn and {names[one["category_id"]] for one in drawn} <= {*classes}:
            boxes = np.array([one["bbox"] for one in drawn], np.float32)
            boxes[:, 2:] += boxes[:, :2]
            ids = np.array([classes.index(names[one["category_id"]]) for one in drawn], np.int32)
            pixels = cv2.imread(str(images / Path(image["file_name"]).name), cv2.IMREAD_COLOR_RGB)
            assert pixels is not None
            tiles.append((pixels, Truth(boxes, ids, np.zeros(len(ids), bool))))
    return tiles


def _measured(detector: Any, tiles: list[tuple[Any, Truth]], classes: tuple[str, ...]) -> dict[str, Any]:
    images = [pixels for pixels, _ in tiles]
    detector.detect(images[:8])
    start = time.perf_counter()
    found = detector.detect(images)
    seconds = time.perf_counter() - start
    results = [TileResult(truth, one, None) for (_, truth), one in zip(tiles, found, strict=True)]
    metrics = evaluate(results, classes)
    rows = label_quality(results, classes, [_THRESHOLD, metrics.f1_conf])
    at, best = (row for row in rows if row["class"] == "all")
    return {
        "map50": metrics.map50,
        "map50_95": metrics.map50_95,
        "f1": metrics.f1,
        "f1_conf": metrics.f1_conf,
        **{f"{name}_at_0.3": at[name] for name in ("precision", "recall")},
        **{f"{name}_at_best_f1": best[name] for name in ("precision", "recall")},
        "tiles_per_s": len(tiles) / seconds,
    }


def _table(views: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(views.values())))
    lines = ["| views | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[key]:.3f}" for key in columns) + " |" for name, row in views.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
