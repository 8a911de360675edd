"""Formats of truth: xView GeoJSON, COCO JSON and DOTA txt, one reader each; YOLO's is in truth_yolo.py.

A reader takes the recipe's truth source and classes and returns a `Collector` with all that the source says, each bad
row rejected on its own. Boxes are xyxy in scene pixels.
"""

import os
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from hotcoco.mask import fr_py_objects, to_bbox

from softlabel.config import TruthSource
from softlabel.errors import TruthError
from softlabel.imagery.listing import walk_files
from softlabel.imagery.truth_collector import (
    Collector,
    Rejected,
    Row,
    listed_collector,
    read_lines,
    require_all,
    targets_of,
)
from softlabel.imagery.truth_fields import (
    BadRow,
    Box,
    as_box,
    as_flag,
    as_hull,
    as_image_name,
    as_label,
    as_numbers,
    as_object,
    as_text,
    as_whole,
    attempt,
    lists_in,
    load_json,
    one_line,
    show,
)

# fmt: off
XVIEW_CLASSES = {
    11: "Fixed-wing Aircraft", 12: "Small Aircraft", 13: "Cargo Plane", 15: "Helicopter", 17: "Passenger Vehicle",
    18: "Small Car", 19: "Bus", 20: "Pickup Truck", 21: "Utility Truck", 23: "Truck", 24: "Cargo Truck",
    25: "Truck w/Box", 26: "Truck Tractor", 27: "Trailer", 28: "Truck w/Flatbed", 29: "Truck w/Liquid",
    32: "Crane Truck", 33: "Railway Vehicle", 34: "Passenger Car", 35: "Cargo Car", 36: "Flat Car", 37: "Tank car",
    38: "Locomotive", 40: "Maritime Vessel", 41: "Motorboat", 42: "Sailboat", 44: "Tugboat", 45: "Barge",
    47: "Fishing Vessel", 49: "Ferry", 50: "Yacht", 51: "Container Ship", 52: "Oil Tanker", 53: "Engineering Vehicle",
    54: "Tower crane", 55: "Container Crane", 56: "Reach Stacker", 57: "Straddle Carrier", 59: "Mobile Crane",
    60: "Dump Truck", 61: "Haul Truck", 62: "Scraper/Tractor", 63: "Front loader/Bulldozer", 64: "Excavator",
    65: "Cement Mixer", 66: "Ground Grader", 71: "Hut/Tent", 72: "Shed", 73: "Building", 74: "Aircraft Hangar",
    76: "Damaged Building", 77: "Facility", 79: "Construction Site", 83: "Vehicle Lot", 84: "Helipad",
    86: "Storage Tank", 89: "Shipping container lot", 91: "Shipping Container", 93: "Pylon", 94: "Tower",
}
"""xView's 60 type ids. Its files also hold a few boxes of 75 and 82, which have no name: those rows are rejected."""

DOTA_CLASSES = (
    "plane", "ship", "storage-tank", "baseball-diamond", "tennis-court", "basketball-court", "ground-track-field",
    "harbor", "bridge", "large-vehicle", "small-vehicle", "helicopter", "roundabout", "soccer-ball-field",
    "swimming-pool", "container-crane", "airport", "helipad",
)
"""The names of DOTA 1.0 to 2.0. Files in its format may have others: those that the recipe names are read."""
# fmt: on


def read_xview(source: TruthSource, classes: tuple[str, ...]) -> Collector:
    """Pixel boxes in `bounds_imcoords`, classes by `type_id`; images without a box are not in the file."""
    features = lists_in(load_json(source.path), ("features",), source.path)[0]
    collector = listed_collector(source, classes, XVIEW_CLASSES)
    collector.read(source.path, enumerate(features), _xview_row)
    return collector


def _xview_row(raw: Any) -> Row:
    properties = as_object(as_object(raw, "the feature").get("properties"), "properties")
    image = as_image_name(properties.get("image_id"), "image_id")
    type_id = attempt(lambda: as_whole(properties.get("type_id"), "type_id"))
    return Row(image, type_id, attempt(lambda: _xview_box(properties.get("bounds_imcoords"))))


def _xview_box(bounds: Any) -> Box:
    return as_box(*as_numbers(as_text(bounds, "bounds_imcoords").split(","), 4, "bounds_imcoords"))


def read_coco(source: TruthSource, classes: tuple[str, ...]) -> Collector:
    """Boxes, and an image's ``group``, ``split`` and ``labelled_categories`` where it has them."""
    lists = lists_in(load_json(source.path), ("images", "annotations", "categories"), source.path)
    images, annotations, categories = lists
    known, bad_categories = _coco_categories(source.path, categories)
    collector = listed_collector(source, classes, known)
    collector.rejected += bad_categories
    names = _coco_images(source.path, images, collector, known)
    rows = ((_coco_number(raw, index), raw) for index, raw in enumerate(annotations))
    collector.read(source.path, rows, partial(_coco_row, names))
    return collector


def _coco_categories(path: str, categories: list[Any]) -> tuple[dict[int, str], list[Rejected]]:
    known: dict[int, str] = {}
    rejected: list[Rejected] = []
    for index, raw in enumerate(categories):
        try:
            category_id = as_whole(as_object(raw, "the category").get("id"), "id")
            if category_id in known:
                raise BadRow(f"category id {category_id} is there twice")
            known[category_id] = as_text(raw.get("name"), "name")
        except BadRow as reason:
            rejected.append((path, None, f"category {index}: {reason}"))
    return known, rejected


def _coco_images(path: str, images: list[Any], collector: Collector, known: dict[int, str]) -> dict[int | str, str]:
    """Map image ids to names, and put each image into the collector, so that those without boxes are there too."""
    names: dict[int | str, str] = {}
    for index, raw in enumerate(images):
        try:
            image_id, name = _coco_image_id(as_object(raw, "the image").get("id")), as_image_name(raw.get("file_name"))
            facts = {
                "file": path,
                "size_wh": _coco_size(raw),
                "labelled_classes": _coco_labelled(raw.get("labelled_categories"), known, collector),
                **{key: as_label(raw.get(key), key) for key in ("group", "split")},
            }
            # One file may have two ids, as where several people's annotations were merged.
            if names.get(image_id, name) != name or collector.image(name, **facts).facts != facts:
                raise BadRow(f"image {show(image_id)} or its file {show(name)} is there twice, and not the same")
            names[image_id] = name
        except BadRow as reason:
            collector.reject(path, None, f"image {index}: {reason}")
    return names


def _coco_labelled(listed: Any, known: dict[int, str], collector: Collector) -> tuple[int, ...] | None:
    """Our classes that are labelled in an image: those whose source classes are all listed, by name or id."""
    if listed is None:
        return None
    names = set(known.values())
    entries = {_coco_category(entry, names) for entry in listed} if isinstance(listed, list) else {None}
    if not entries <= {*known, *names}:
        raise BadRow(f"labelled_categories {show(listed)} must be a list of categories, by name or id")
    sources: dict[int, list[int]] = defaultdict(list)
    for key in known:
        if (target := collector.targets[key]) is not None:
            sources[target].append(key)
    complete = (target for target, keys in sources.items() if all({key, known[key]} & entries for key in keys))
    return tuple(sorted(complete))


def _coco_category(entry: Any, names: set[str]) -> int | str | None:
    if isinstance(entry, str) and entry in names:
        return entry
    found = attempt(lambda: as_whole(entry, "category"))
    return None if isinstance(found, BadRow) else found


def _coco_image_id(value: Any) -> int | str:
    """A number, even where it is written as text; other texts stay as they are, "007" too."""
    if isinstance(value, str) and not re.fullmatch(r"-?(0|[1-9]\d*)(\.0+)?", value):
        return value
    return as_whole(value, "image id")


def _coco_size(raw: dict) -> tuple[int, int] | None:
    if raw.get("width") is None or raw.get("height") is None:
        return None
    return as_whole(raw["width"], "width"), as_whole(raw["height"], "height")


def _coco_number(raw: Any, index: int) -> int:
    number = raw.get("id") if isinstance(raw, dict) else None
    return number if isinstance(number, int) and 0 <= number < 2**63 and not isinstance(number, bool) else index


def _coco_row(names: dict[int | str, str], raw: Any) -> Row:
    image_id = _coco_image_id(as_object(raw, "the annotation").get("image_id"))
    if image_id not in names:
        raise BadRow(f"no image has id {show(image_id)}")
    source_class = attempt(lambda: as_whole(raw.get("category_id"), "category_id"))
    crowd = attempt(lambda: as_flag(raw.get("iscrowd"), "iscrowd"))
    if isinstance(crowd, BadRow):  # one object or many, nobody knows: as good as of no class
        source_class, crowd = crowd, False
    return Row(names[image_id], source_class, attempt(lambda: _coco_box(raw)), crowd)


def _coco_box(raw: dict) -> Box:
    """The bbox; for an annotation without one, that of its polygons or its mask."""
    outline = raw.get("segmentation")
    if raw.get("bbox") is not None or not outline:
        x, y, width, height = as_numbers(raw.get("bbox"), 4, "bbox")
        return as_box(x, y, x + width, y + height)
    if isinstance(outline, list):
        rings = outline if isinstance(outline[0], list) else [outline]
        points = [as_numbers(ring, len(ring) if isinstance(ring, list) else 0, "segmentation") for ring in rings]
        if any(len(ring) < 6 or len(ring) % 2 for ring in points):
            raise BadRow("a polygon of segmentation needs three points or more")
        return as_hull([number for ring in points for number in ring])
    return _rle_box(as_object(outline, "segmentation"))


def _rle_box(mask: dict) -> Box:
    """The box of a run-length encoded mask, compressed or not."""
    height, width = (as_whole(side, "size") for side in as_numbers(mask.get("size"), 2, "size"))
    counts = mask.get("counts")
    if not 0 < height * width < 2**32:
        raise BadRow(f"segmentation has a size of {width}x{height} px")
    if isinstance(counts, list):
        runs = [as_whole(count, "counts") for count in counts]
        if min(runs, default=-1) < 0 or sum(runs) != height * width:
            raise BadRow("the counts of segmentation do not add up to its size")
        mask = fr_py_objects({"size": [height, width], "counts": runs}, height, width)
    else:
        mask = {"size": [height, width], "counts": as_text(counts, "counts")}
    try:
        x, y, across, down = (float(side) for side in to_bbox(mask))
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRow(f"segmentation is no mask: {one_line(error)}") from None
    return as_box(x, y, x + across, y + down)


def read_dota(source: TruthSource, classes: tuple[str, ...]) -> Collector:
    """A folder of txt files, one per image: four corners per box, kept beside their upright bounding box."""
    root = Path(source.path)
    named = [str(key) for key in source.mapping] or list(classes)
    targets = targets_of(source, classes, {name: name for name in (*DOTA_CLASSES, *named)})
    collector = Collector(source.other_classes == "drop", targets)
    for file in dota_files(root):
        image = file.relative_to(root).with_suffix("").as_posix()
        collector.image(image, file=str(file))
        read_lines(collector, file, image, partial(_dota_row, image), skip=("imagesource", "gsd"))
    seen = {class_id for image in collector.images.values() for class_id in image.class_ids}
    sure = source.mapping or DOTA_CLASSES
    require_all(source, classes, seen | {collector.targets[str(name)] for name in sure}, DOTA_CLASSES)
    return collector


def dota_files(root: Path) -> list[Path]:
    """The label files of a DOTA folder, sorted; TruthError where there is none."""
    if not os.path.isdir(root):
        raise TruthError(f"no folder of DOTA txt files at {root}: correct tiles.truth.path")
    files = [Path(file) for file in walk_files(str(root)) if file.endswith(".txt")]
    if not files:
        raise TruthError(f"no .txt file in {root}: set tiles.truth.path to the folder of DOTA labels")
    return files


def _dota_row(image: str, line: str) -> Row:
    parts = line.split()
    if len(parts) not in (9, 10):
        problem = BadRow(f"needs eight numbers, a class and difficult, has {len(parts)} values")
        return Row(image, problem, problem)
    corners, box = None, attempt(lambda: as_hull(as_numbers(parts[:8], 8, "corners")))
    if not isinstance(box, BadRow):
        corners = tuple(as_numbers(parts[:8], 8, "corners"))
    difficult = parts[9] if len(parts) == 10 else "0"
    if difficult not in ("0", "1", "2"):
        problem = BadRow(f"difficult must be 0, 1 or 2, it is {show(difficult)}")
        return Row(image, problem, box, corners=corners)
    return Row(image, parts[8], box, difficult != "0", corners)
