"""Does a best.pt of plain ultralytics label here as well as it validates there?

python benchmarks/checkpoint.py --images DIR/images --truth DIR/instances.json --weights yolov5n.pt --run-dir runs/best

Trains YOLOv5u-n with ultralytics' own trainer from COCO's backbone, validates its best.pt with ultralytics' own
validator, and lets `softlabel label` and `softlabel evaluate` do the same: the same images (planes and ships, whole,
taken as drawn completely), image size, floor, IoU and max_det.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from common import machine

from softlabel.cli import main as softlabel

_CLASSES = ("plane", "ship")
_IMGSZ, _FLOOR, _IOU, _MAX_DET = 320, 0.001, 0.7, 300
_VALIDATE = {"imgsz": _IMGSZ, "conf": _FLOOR, "iou": _IOU, "max_det": _MAX_DET, "device": "cpu", "workers": 0}


def main() -> int:
    """Train, validate, label, evaluate; print both results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--truth", type=Path, required=True, help="COCO JSON with a `split` for each image")
    parser.add_argument("--weights", type=Path, required=True, help="yolov5n.pt, for the backbone")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir.resolve()
    data, truth = _data_set(arguments.images.resolve(), arguments.truth, run_dir)
    best = run_dir / "ultralytics" / "weights" / "best.pt"
    if not best.exists():
        _train(arguments.weights, data, run_dir, arguments.epochs, arguments.seed)
    found = {
        "machine": machine(),
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "ultralytics": _validate(best, data),
        "softlabel": _label(best, run_dir, truth),
    }
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def _data_set(images: Path, truth: Path, run_dir: Path) -> tuple[Path, Path]:
    """The images of planes and ships as a YOLO folder, and their test split as COCO JSON."""
    document = json.loads(truth.read_text())
    names = {one["id"]: one["name"] for one in document["categories"]}
    boxes: dict[int, list[dict]] = {}
    for one in document["annotations"]:
        boxes.setdefault(one["image_id"], []).append(one)
    drawn = {one["id"]: {names[box["category_id"]] for box in boxes.get(one["id"], [])} for one in document["images"]}
    kept = [one for one in document["images"] if drawn[one["id"]] <= {*_CLASSES}]
    kept = [{**one, "file_name": Path(one["file_name"]).name} for one in kept]
    folder = run_dir / "data"
    shutil.rmtree(folder, ignore_errors=True)
    roles = {"train_1": "train", "train_2": "train", "val": "val", "test": "test"}
    for image in kept:
        role = roles[image["split"]]
        picture = folder / "images" / role / image["file_name"]
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.symlink_to(images / image["file_name"])
        label = folder / "labels" / role / f"{picture.stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("".join(_line(box, image, names) for box in boxes.get(image["id"], [])))
    config = {
        "path": str(folder),
        "names": list(_CLASSES),
        **{role: f"images/{role}" for role in ("train", "val", "test")},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(config))
    test = [{key: one[key] for key in ("id", "file_name", "width", "height")} for one in kept if one["split"] == "test"]
    ids = {one["id"] for one in test}
    annotations = [one for one in document["annotations"] if one["image_id"] in ids]
    path = folder / "test.json"
    path.write_text(json.dumps({**document, "images": test, "annotations": annotations}))
    return folder / "data.yaml", path


def _line(box: dict, image: dict, names: dict[int, str]) -> str:
    x, y, w, h = box["bbox"]
    width, height = image["width"], image["height"]
    shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
    return f"{_CLASSES.index(names[box['category_id']])} {' '.join(f'{share:.9f}' for share in shares)}\n"


def _train(weights: Path, data: Path, run_dir: Path, epochs: int, seed: int) -> None:
    from ultralytics import YOLO

    from softlabel.detectors.weights import load_matching

    model = YOLO("yolov5n.yaml")
    load_matching(model.model, weights)
    model.ckpt = {"model": model.model}  # else the trainer would build it anew
    options = {"batch": 8, "nbs": 8, "optimizer": "AdamW", "lr0": 0.001, "close_mosaic": 2, "warmup_epochs": 1}
    folder = {"project": str(run_dir), "name": "ultralytics", "exist_ok": True, "plots": False}
    model.train(data=str(data), epochs=epochs, imgsz=_IMGSZ, seed=seed, device="cpu", workers=0, **options, **folder)


def _validate(best: Path, data: Path) -> dict[str, float]:
    from ultralytics import YOLO

    box = YOLO(best).val(data=str(data), split="test", plots=False, verbose=False, **_VALIDATE).box
    return {"map50": float(box.map50), "map50_95": float(box.map)}


def _label(best: Path, run_dir: Path, truth: Path) -> dict[str, Any]:
    recipe = {
        "name": "checkpoint",
        "classes": list(_CLASSES),
        "tiles": {
            "scenes": str(run_dir / "data" / "images" / "test"),
            "truth": {"format": "coco", "path": str(truth), "other_classes": "drop"},
            "size_px": 704,
            "split": {"train_1": 0, "train_2": 0, "test": 1, "validation": 0},
        },
        "label": {
            "weights": str(best),
            "imgsz": _IMGSZ,
            "floor": _FLOOR,
            "iou": _IOU,
            "max_det": _MAX_DET,
            "engine": "pytorch",
        },
    }
    path = run_dir / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    folder = run_dir / "softlabel"
    for verb in ("label", "evaluate"):
        assert softlabel([verb, "--config", str(path), "--run-dir", str(folder)]) == 0
    (done,) = folder.glob("evaluate-*/done.json")
    numbers = json.loads(done.read_text())
    return {key: numbers[key] for key in ("map50", "map50_95")}


if __name__ == "__main__":
    sys.exit(main())
