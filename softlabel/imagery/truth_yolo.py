"""YOLO truth: data.yaml, its images and a label file for each, as ultralytics reads them, and darknet's lists."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from softlabel.config import TruthSource
from softlabel.errors import TruthError
from softlabel.imagery.listing import walk_files
from softlabel.imagery.truth_collector import Collector, Row, listed_collector, read_lines
from softlabel.imagery.truth_fields import (
    IMAGE_SUFFIXES,
    BadRow,
    Box,
    as_box,
    as_hull,
    as_numbers,
    as_text,
    as_whole,
    attempt,
    load,
    load_yaml,
    show,
)


def read_yolo(source: TruthSource, classes: tuple[str, ...]) -> Collector:
    """The label files of the images in data.yaml's train, val and test."""
    path = Path(source.path)
    data = load_yaml(path)
    collector = listed_collector(source, classes, _yolo_names(path, data))
    splits = yolo_images(path, data, collector)
    for split, images in splits.items():
        labels = [label for label, _ in images.values()]
        # An image without a label file is background, by YOLO's convention; but hardly all of them.
        if labels and not any(map(os.path.isfile, labels)):
            collector.warnings.append(f"none of the {len(labels)} images of {split} has labels, as {labels[0]}")
        for label, image in images.values():
            is_new = image not in collector.images
            collector.image(image, file=str(label), normalised=True)
            if is_new and os.path.isfile(label):
                read_lines(collector, label, image, partial(_yolo_row, collector, image))
    return collector


def _yolo_names(path: Path, data: dict) -> dict[int, str]:
    """Class names by number, as ultralytics reads them: a list, a mapping with numbers or texts as keys, or ``nc``."""
    listed, count = data.get("names"), data.get("nc")
    if listed is None and count is not None:
        number = attempt(lambda: as_whole(count, "nc"))
        listed = [f"class_{i}" for i in range(number)] if isinstance(number, int) and 0 < number < 100_000 else None
    named = dict(enumerate(listed)) if isinstance(listed, list) else listed if isinstance(listed, dict) else {}
    known = {attempt(partial(as_whole, key, "key")): _yolo_name(name) for key, name in named.items()}
    if not known or len(known) < len(named) or not all(isinstance(key, int) and name for key, name in known.items()):
        raise TruthError(f"{path} needs `names`, a list of class names or a mapping from number to name, or `nc`")
    return {key: name for key, name in known.items() if isinstance(key, int) and name}


def _yolo_name(name: Any) -> str | None:
    found = attempt(lambda: as_text(str(name) if type(name) in (int, float) else name, "name"))
    return None if isinstance(found, BadRow) else found


def yolo_images(path: Path, data: dict, collector: Collector | None = None) -> dict[str, dict[str, tuple[Path, str]]]:
    """By split (train, val, test) and image name, relative to the data set's folder: label file and image name.

    An image that is listed but not there becomes a rejection in ``collector``.
    """
    folder = data.get("path") or "."
    if not isinstance(folder, str):
        raise TruthError(f"{path}: path must be a folder, it is {show(folder)}")
    # In an exported data set, `path` often names a folder of the machine it was made on.
    root = path.parent / folder if os.path.isdir(path.parent / folder) else path.parent
    found: dict[str, dict[str, tuple[Path, str]]] = {}
    for split in ("train", "val", "test"):
        listed = data.get("validation") if split == "val" and "val" not in data else data.get(split)
        found[split] = {}
        for image in _yolo_split(path, root, split, listed, collector):
            name = PurePosixPath(os.path.relpath(image, root)).as_posix()
            found[split][name] = _yolo_label(image), name
    return found


def _yolo_split(path: Path, root: Path, split: str, listed: Any, collector: Collector | None) -> Iterator[Path]:
    entries = [] if listed is None else listed if isinstance(listed, list) else [listed]
    for entry in entries:
        if not isinstance(entry, str):
            raise TruthError(f"{path}: train, val and test must be paths, one is {show(entry)}")
        # Roboflow writes ../train/images and puts the folder beside data.yaml.
        candidates = (root / entry, root / entry.removeprefix("../"))
        place = next((place for place in candidates if os.path.exists(place)), None)
        if place is None and split == "test":  # ultralytics does not look for it until asked to
            if collector:
                collector.warnings.append(f"{path} names {show(entry)} as test, and it is not there")
        elif place is None:
            raise TruthError(f"{path} names {show(entry)}, not found in {root}: correct its path, train, val or test")
        else:
            yield from _yolo_listed(root, place, collector)


def _yolo_listed(root: Path, place: Path, collector: Collector | None) -> Iterator[Path]:
    """The images of a folder, sorted, or those that a txt file lists."""
    if os.path.isdir(place):
        yield from (Path(image) for image in walk_files(str(place)) if image.lower().endswith(IMAGE_SUFFIXES))
        return
    for number, line in enumerate(load(place, str.splitlines, "text"), start=1):
        if not line.strip():
            continue
        image = _yolo_image(root, place.parent, line.strip().replace("\\", "/"))
        if image is not None:
            yield image
        elif collector is not None:
            reason = f"line {number} lists {show(line.strip())}, which is neither in {place.parent} nor in {root}"
            collector.reject(str(place), None, reason)


def _yolo_image(root: Path, folder: Path, line: str) -> Path | None:
    """The image of a list's line: ``./`` counts from the list's folder, as in ultralytics, all else from the data
    set's, where the end of darknet's data/obj/a.png, or of another machine's absolute path, is looked for too.

    That end includes a folder, or any image of that name would do: train/1.png is not val/1.png.
    """
    if line.startswith("./"):
        candidates = [folder / line, root / line]
    else:
        parts = PurePosixPath(line).parts
        last = len(parts) - (0 if len(parts) > 1 and parts[-2] == root.resolve().name else 1)
        candidates = [root / line, *(root.joinpath(*parts[i:]) for i in range(1, last)), folder / line]
    return next((Path(os.path.normpath(image)) for image in candidates if os.path.isfile(image)), None)


def _yolo_label(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt") if image.name else image


def _yolo_row(collector: Collector, image: str, line: str) -> Row:
    name, *numbers = line.split()
    box = attempt(lambda: _yolo_box(numbers))
    collector.counts["polygons"] += len(numbers) > 4 and not isinstance(box, BadRow)
    return Row(image, attempt(lambda: as_whole(name, "class")), box)


def _yolo_box(numbers: list[str]) -> Box:
    """The box of a centre, width and height, or around the corners of a polygon."""
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        return as_hull(as_numbers(numbers, len(numbers), "polygon"))
    if len(numbers) != 4:
        raise BadRow(f"needs a class and four numbers, or the corners of a polygon, has {len(numbers) + 1} values")
    x, y, width, height = as_numbers(numbers, 4, "box")
    return as_box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
