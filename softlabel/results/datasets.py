"""Soft labels above a threshold as a data set of tiles that other tools read: COCO JSON, a YOLO folder (of upright or
of rotated boxes), or DOTA's text files.

All name a tile's picture after its tile_id (softlabel.results.names). Boxes are xyxy in tile pixels.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from softlabel import rotated
from softlabel.records import Detections
from softlabel.results.names import safe_name
from softlabel.store import commit, write_text

ANNOTATIONS, DATA_YAML = "annotations.json", "data.yaml"
NO_SPLIT = "none"
"""The folder of tiles that belong to no split."""


def image_file(tile: dict, *, by_split: bool) -> Path:
    """Where a tile's picture goes, below the data set's folder: ``images/``, or ``images/SPLIT/`` for YOLO."""
    folder = Path("images", _split_folder(tile["split"])) if by_split else Path("images")
    return folder / f"{safe_name(tile['tile_id'])}.png"


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Commit RGB pixels (H, W, 3) as PNG."""
    _, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    commit(path, lambda temporary: temporary.write_bytes(data.tobytes()))


def _split_folder(split: str | None) -> str:
    """A safe name of a split's folder: a truth file may name its splits as it likes."""
    return NO_SPLIT if split is None else split if re.fullmatch(r"[\w-]+", split) else safe_name(split)


def yolo_labels(found: Detections, size_wh: tuple[int, int]) -> str:
    """A YOLO label file: per box the best class, then centre, width and height as shares of the tile."""
    boxes = found.boxes.astype(np.float64) / np.array(size_wh * 2, np.float64)
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    rows = zip(found.class_ids.tolist(), np.concatenate([centres, sizes], axis=1).tolist(), strict=True)
    return "".join(f"{class_id} {' '.join(f'{share:.9f}' for share in shares)}\n" for class_id, shares in rows)


def yolo_obb_labels(found: Detections, size_wh: tuple[int, int]) -> str:
    """A label file of YOLO for rotated boxes: per box the best class, then four corners as shares of the tile.

    Corners are clipped to the tile, as ultralytics does in training: one box far outside costs an image all its labels.
    """
    shares_N8 = np.clip(_corners(found) / np.array(size_wh, np.float64), 0, 1).reshape(-1, 8)
    rows = zip(found.class_ids.tolist(), shares_N8.tolist(), strict=True)
    return "".join(f"{class_id} {' '.join(f'{share:.9f}' for share in shares)}\n" for class_id, shares in rows)


def dota_labels(found: Detections, classes: Sequence[str]) -> str:
    """A label file of DOTA: per box four corners in pixels, the best class, and 0 for not difficult.

    DOTA splits its lines at spaces: those in a class's name become hyphens, as in its own ``small-vehicle``.
    """
    names = ["-".join(name.split()) for name in classes]
    rows = zip(found.class_ids.tolist(), _corners(found).reshape(-1, 8).tolist(), strict=True)
    return "".join(f"{' '.join(f'{c:.2f}' for c in corners)} {names[class_id]} 0\n" for class_id, corners in rows)


def _corners(found: Detections) -> NDArray[np.float64]:
    """(N, 4, 2) in pixels of the tile, clockwise on screen, as DOTA wants them."""
    return rotated.corners(rotated.drawn(found.boxes, found.xywhr).astype(np.float64))[:, ::-1]


def label_file(image: Path) -> Path:
    """Where YOLO looks for the labels of a picture: ``labels`` instead of ``images``, .txt for its suffix."""
    return Path("labels", *image.parts[1:]).with_suffix(".txt")


def write_yolo_config(folder: Path, classes: Sequence[str], splits: Sequence[str]) -> None:
    """Commit the data.yaml of a YOLO folder.

    ``train`` is every split whose name begins so (train_1, train_2), ``val`` and ``test`` likewise. YOLO demands the
    first two: without a training split all tiles are trained on, without a validation split the training tiles validate
    too.
    """
    named = {role: [split for split in splits if split.startswith(role)] for role in ("train", "val", "test")}
    train = named["train"] or list(splits)
    roles = {"train": train, "val": named["val"] or train, "test": named["test"]}
    paths = {role: [f"images/{split}" for split in found] for role, found in roles.items() if found}
    data = {**paths, "names": dict(enumerate(classes))}
    write_text(folder / DATA_YAML, yaml.safe_dump(data, sort_keys=False, default_flow_style=None))


def write_coco(
    path: Path, tiles: Callable[[], Iterable[tuple[dict, Detections]]], classes: Sequence[str], info: dict[str, Any]
) -> None:
    """Commit a COCO file, written as the tiles come, so that memory does not grow with them.

    Image ids, box ids and category ids count from 1. An image has its group and split, which this project's own reader
    uses, and its tile_id; a box has the score of its class.

    Args:
        path: The JSON file.
        tiles: Called twice, since COCO lists all images before all boxes: tile rows with their detections.
        classes: In the order of the class vectors.
        info: The file's ``info``.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "w") as file:
            categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
            file.write(f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)},\n"images": [')
            _write_items(file, _coco_images(tiles()))
            file.write('],\n"annotations": [')
            _write_items(file, _coco_boxes(tiles()))
            file.write("]}\n")

    commit(path, write)


def _coco_images(tiles: Iterable[tuple[dict, Detections]]) -> Iterator[dict]:
    for number, (tile, _) in enumerate(tiles, start=1):
        yield {
            "id": number,
            "file_name": image_file(tile, by_split=False).name,
            "width": tile["window"][2],
            "height": tile["window"][3],
            "group": tile["group"],
            **({} if tile["split"] is None else {"split": tile["split"]}),
            "tile_id": tile["tile_id"],
        }


def _coco_boxes(tiles: Iterable[tuple[dict, Detections]]) -> Iterator[dict]:
    numbers = itertools.count(1)
    for image_id, (_, found) in enumerate(tiles, start=1):
        boxes = found.boxes.astype(np.float64).tolist()
        for (x0, y0, x1, y1), class_id, score in zip(boxes, found.class_ids.tolist(), found.best, strict=True):
            yield {
                "id": next(numbers),
                "image_id": image_id,
                "category_id": class_id + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "score": round(float(score), 6),
            }


def _write_items(file: IO[str], items: Iterable[dict]) -> None:
    separator = "\n"
    for item in items:
        file.write(separator + json.dumps(item))
        separator = ",\n"
