"""The four formats of truth: xView GeoJSON, COCO JSON, YOLO txt and DOTA txt, one reader each.

A reader takes the recipe's truth source and classes and returns a `Collector` with all that the source says, bad rows
rejected by themselves. Boxes are xyxy in scene pixels; YOLO gives shares of the image.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from softlabel.config import TruthSource
from softlabel.errors import TruthError
from softlabel.imagery.collector import Collector, Rejected, Row, listed_collector, require_all, targets_of
from softlabel.imagery.fields import (
    IMAGE_SUFFIXES,
    BadRow,
    as_box,
    as_image_name,
    as_label,
    as_numbers,
    as_object,
    as_text,
    as_whole,
    is_in,
    lists_in,
    load,
    load_json,
    load_yaml,
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
"""xView's 60 type ids. Its files also hold a few boxes of 75 and 82, which have no name: they are rejected by row."""

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
    bounds = as_text(properties.get("bounds_imcoords"), "bounds_imcoords").split(",")
    box = as_box(*as_numbers(bounds, 4, "bounds_imcoords"))
    return Row(image, as_whole(properties.get("type_id"), "type_id"), box)


def read_coco(source: TruthSource, classes: tuple[str, ...]) -> Collector:
    """Also ``group``, ``split`` and ``labelled_categories`` of an image, where it has them."""
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
    """Image id to name; puts each image into the collector, so that those without boxes are there too."""
    names: dict[int | str, str] = {}
    for index, raw in enumerate(images):
        try:
            image_id, name = _coco_image_id(as_object(raw, "the image").get("id")), as_image_name(raw.get("file_name"))
            if image_id in names or name in collector.images:
                raise BadRow(f"image {show(image_id)} or its file {show(name)} is there twice")
            facts = {key: as_label(raw.get(key), key) for key in ("group", "split")}
            labelled = _coco_labelled(raw.get("labelled_categories"), known, collector)
            collector.image(name, file=path, size_wh=_coco_size(raw), labelled_classes=labelled, **facts)
            names[image_id] = name
        except BadRow as reason:
            collector.reject(path, None, f"image {index}: {reason}")
    return names


def _coco_labelled(listed: Any, known: dict[int, str], collector: Collector) -> tuple[int, ...] | None:
    """Our classes that are drawn in an image: those all of whose source classes are listed, by name or id."""
    if listed is None:
        return None
    entries = {entry for entry in listed if isinstance(entry, int | str)} if isinstance(listed, list) else set()
    if not isinstance(listed, list) or not all(is_in(entry, {*known, *known.values()}) for entry in listed):
        raise BadRow(f"labelled_categories {show(listed)} must be a list of categories, by name or id")
    sources: dict[int, list[int]] = defaultdict(list)
    for key in known:
        if (target := collector.targets[key]) is not None:
            sources[target].append(key)
    complete = (target for target, keys in sources.items() if all({key, known[key]} & entries for key in keys))
    return tuple(sorted(complete))


def _coco_image_id(value: Any) -> int | str:
    return value if isinstance(value, str) else as_whole(value, "image id")


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
    x, y, width, height = as_numbers(raw.get("bbox"), 4, "bbox")
    crowd = as_whole(raw.get("iscrowd") or 0, "iscrowd") != 0
    source_class = as_whole(raw.get("category_id"), "category_id")
    return Row(names[image_id], source_class, as_box(x, y, x + width, y + height), crowd)


def read_yolo(source: TruthSource, classes: tuple[str, ...]) -> Collector:
    """The label files of the images in data.yaml's train, val and test."""
    path = Path(source.path)
    data = load_yaml(path)
    listed = data.get("names")
    known = dict(enumerate(listed)) if isinstance(listed, list) else listed
    # A hexadecimal number of YAML may be longer than Python writes in decimals.
    if not isinstance(known, dict) or not all(
        type(key) is int and abs(key) < 2**63 and isinstance(known[key], str) for key in known
    ):
        raise TruthError(f"{path} needs `names`, a list of class names or a mapping from number to name")
    collector = listed_collector(source, classes, known)
    for label, image in yolo_images(path, data).values():
        collector.image(image, file=str(label), normalised=True)
        if os.path.isfile(label):  # an image without a label file is background, by YOLO's convention
            _read_lines(collector, label, partial(_yolo_row, image))
    return collector


def yolo_images(path: Path, data: dict) -> dict[str, tuple[Path, str]]:
    """Label file and image name (below the data set's folder) of each image in train, val and test."""
    folder = data.get("path") or "."
    if not isinstance(folder, str):
        raise TruthError(f"{path}: path must be a folder, it is {show(folder)}")
    # As exported, `path` often names a folder of the machine it was made on.
    root = path.parent / folder if os.path.isdir(path.parent / folder) else path.parent
    found = {}
    for image in (image for split in ("train", "val", "test") for image in _yolo_split(path, root, data.get(split))):
        name = PurePosixPath(os.path.relpath(image, root)).as_posix()
        found[name] = _yolo_label(image), name
    return found


def _yolo_split(path: Path, root: Path, listed: Any) -> Iterator[Path]:
    entries = [] if listed is None else listed if isinstance(listed, list) else [listed]
    for entry in entries:
        if not isinstance(entry, str):
            raise TruthError(f"{path}: train, val and test must be paths, one is {show(entry)}")
        # Roboflow writes ../train/images and puts the folder beside data.yaml.
        candidates = (root / entry, root / entry.removeprefix("../"))
        place = next((place for place in candidates if os.path.exists(place)), None)
        if place is None:
            raise TruthError(f"{path} names {show(entry)}, not found in {root}: correct its path, train, val or test")
        yield from _yolo_listed(root, place)


def _yolo_listed(root: Path, place: Path) -> list[Path]:
    """The images of a folder, sorted, or those that a txt file lists."""
    if os.path.isdir(place):
        paths = (Path(folder, name) for folder, _, names in os.walk(place) for name in names)
        return sorted(image for image in paths if image.suffix.lower() in IMAGE_SUFFIXES)
    lines = (line.strip() for line in load(place, str.splitlines, "text"))
    return [root / line for line in lines if line]


def _yolo_label(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt") if image.name else image


def _yolo_row(image: str, line: str) -> Row:
    parts = line.split()
    if len(parts) != 5:
        raise BadRow(f"needs a class and four numbers, has {len(parts)} values (polygons are not read)")
    x, y, width, height = as_numbers(parts[1:], 4, "box")
    source_class = as_whole(int(parts[0]) if parts[0].isdecimal() and len(parts[0]) < 19 else parts[0], "class")
    return Row(image, source_class, as_box(x - width / 2, y - height / 2, x + width / 2, y + height / 2))


def read_dota(source: TruthSource, classes: tuple[str, ...]) -> Collector:
    """A folder of txt files, one per image: four corners, of which the upright hull is taken."""
    root = Path(source.path)
    named = [str(key) for key in source.mapping] or list(classes)
    targets = targets_of(source, classes, {name: name for name in (*DOTA_CLASSES, *named)})
    collector = Collector(source.other_classes == "drop", targets)
    for file in dota_files(root):
        image = file.relative_to(root).with_suffix("").as_posix()
        collector.image(image, file=str(file))
        _read_lines(collector, file, partial(_dota_row, image), skip=("imagesource", "gsd"))
    seen = {class_id for image in collector.images.values() for class_id in image.class_ids}
    sure = source.mapping or DOTA_CLASSES
    require_all(source, classes, seen | {collector.targets[str(name)] for name in sure}, DOTA_CLASSES)
    return collector


def dota_files(root: Path) -> list[Path]:
    """The label files of a DOTA folder, sorted; TruthError where there is none."""
    if not os.path.isdir(root):
        raise TruthError(f"no folder of DOTA txt files at {root}: correct tiles.truth.path")
    files = sorted(Path(folder, name) for folder, _, names in os.walk(root) for name in names if name.endswith(".txt"))
    if not files:
        raise TruthError(f"no .txt file in {root}: set tiles.truth.path to the folder of DOTA labels")
    return files


def _dota_row(image: str, line: str) -> Row:
    parts = line.split()
    if len(parts) not in (9, 10):
        raise BadRow(f"needs eight numbers, a class and difficult, has {len(parts)} values")
    corners = as_numbers(parts[:8], 8, "corners")
    xs, ys = corners[::2], corners[1::2]
    difficult = parts[9] if len(parts) == 10 else "0"
    if difficult not in ("0", "1", "2"):
        raise BadRow(f"difficult must be 0 or 1, it is {show(difficult)}")
    return Row(image, parts[8], as_box(min(xs), min(ys), max(xs), max(ys)), difficult != "0")


def _read_lines(collector: Collector, file: Path, parse: Callable[[str], Row], skip: tuple[str, ...] = ()) -> None:
    """Every line of a label file but empty ones and headers; an unreadable file is one rejection."""
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except (OSError, ValueError) as error:
        collector.reject(str(file), None, f"cannot be read: {one_line(error)}")
        return
    rows = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    wanted = ((number, line) for number, line in rows if line and not line.lower().startswith(skip or ("\0",)))
    collector.read(str(file), wanted, parse)
