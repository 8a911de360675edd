"""Boxes that people drew, read from xView GeoJSON, COCO JSON, YOLO txt or DOTA txt.

One reader per format turns each of its rows into a `_Row`, or raises `_BadRow`; `_Collector` names the classes and
sorts rows into scenes, rejected ones and ones left out on purpose. A row is one box in a truth file. Boxes are xyxy
(N, 4), x right, y down, max edges exclusive, in scene pixels (YOLO gives shares of the image: `SceneTruth.fitted`).
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from softlabel import boxes as box_math
from softlabel import store
from softlabel.config import TruthSource
from softlabel.errors import TruthError

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

_IMAGES = (".tif", ".tiff", ".jpg", ".jpeg", ".png", ".bmp", ".webp")
_FAR_PX = 1e9
_MIN_SIDE_PX = 0.01  # thinner is a slip of the mouse, and would lose its area in float32 tile pixels
# What parsers raise on arbitrary bytes: yaml.safe_load lets KeyError, IndexError and AttributeError out of bad tags.
_UNREADABLE = (
    *(OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError, MemoryError),
    yaml.YAMLError,
)


@dataclass(frozen=True)
class RejectedTruth:
    """A row that cannot be used. ``row`` is as in `SceneTruth`; None where it is the whole file."""

    file: str
    row: int | None
    reason: str


@dataclass(frozen=True)
class SceneTruth:
    """The truth of one image. ``boxes`` (N, 4) float64; ``class_ids`` (N,) int32 count in the recipe's classes.

    ``crowd`` (N,) bool marks COCO crowds and DOTA difficults, which are ignored. ``rows`` (N,) int64 lead back into
    ``file``: the feature's index (xView), the annotation's id or else index (COCO), the line from 1 (YOLO, DOTA).
    ``labelled_classes`` None is all. ``normalised``: boxes are shares of the image, in [0, 1].
    """

    file: str
    boxes: NDArray[np.float64]
    class_ids: NDArray[np.int32]
    crowd: NDArray[np.bool_]
    rows: NDArray[np.int64]
    labelled_classes: tuple[int, ...] | None = None
    group: str | None = None
    split: str | None = None
    size_wh: tuple[int, int] | None = None
    normalised: bool = False

    def fitted(self, width: int, height: int) -> tuple["SceneTruth", list[RejectedTruth]]:
        """The truth in pixels of its image, boxes partly outside clipped to it, those outside rejected."""
        scale = np.array([width, height] * 2, np.float64) if self.normalised else 1.0
        clipped = box_math.clip(self.boxes * scale, (0, 0, width, height)).astype(np.float64)
        inside = ((clipped[:, 2:] - clipped[:, :2]) >= _MIN_SIDE_PX).all(axis=1)
        reason = f"outside its image of {width}x{height} px, or thinner than {_MIN_SIDE_PX} px inside it"
        rejected = [RejectedTruth(self.file, int(row), reason) for row in self.rows[~inside]]
        kept = {name: getattr(self, name)[inside] for name in ("class_ids", "crowd", "rows")}
        return replace(self, boxes=clipped[inside], normalised=False, **kept), rejected


@dataclass(frozen=True)
class TruthSet:
    """All truth of a source. ``scenes`` goes by image file name as the truth has it (DOTA: without a suffix).

    ``dropped`` counts boxes of known classes left out on purpose (``other_classes: drop``).
    """

    scenes: dict[str, SceneTruth]
    rejected: list[RejectedTruth]
    dropped: int


class _BadRow(ValueError):
    """Why a row is rejected."""


class _Row(NamedTuple):
    image: str
    source_class: int | str
    box: tuple[float, float, float, float]
    crowd: bool = False


@dataclass
class _Image:
    """A scene's truth while it is read; ``facts`` are fields of `SceneTruth`."""

    facts: dict[str, Any]
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    class_ids: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def done(self) -> SceneTruth:
        return SceneTruth(
            boxes=np.array(self.boxes, np.float64).reshape(-1, 4),
            class_ids=np.array(self.class_ids, np.int32),
            crowd=np.array(self.crowd, bool),
            rows=np.array(self.rows, np.int64),
            **self.facts,
        )


class _Collector:
    """Takes rows in, naming their classes. ``targets`` maps source class to ours, None where none is mapped."""

    def __init__(self, drop_others: bool, targets: dict[int | str, int | None]) -> None:
        self.drop_others, self.targets = drop_others, targets
        self.images: dict[str, _Image] = {}
        self.rejected: list[RejectedTruth] = []
        self.dropped = 0

    def image(self, name: str, **facts: Any) -> _Image:
        return self.images.setdefault(name, _Image(facts))

    def reject(self, file: str, row: int | None, reason: object) -> None:
        self.rejected.append(RejectedTruth(file, row, str(reason)))

    def read(self, file: str, rows: Iterable[tuple[int, Any]], parse: Callable[[Any], _Row]) -> None:
        for number, raw in rows:
            try:
                self._add(file, number, parse(raw))
            except _BadRow as reason:
                self.reject(file, number, reason)

    def done(self) -> TruthSet:
        return TruthSet({name: image.done() for name, image in self.images.items()}, self.rejected, self.dropped)

    def _add(self, file: str, number: int, row: _Row) -> None:
        image = self.image(row.image, file=file)
        if row.source_class not in self.targets:
            raise _BadRow(f"unknown class {_show(row.source_class)}")
        target = self.targets[row.source_class]
        if target is None and self.drop_others:
            self.dropped += 1
            return
        if target is None:
            raise _BadRow(
                f"class {_show(row.source_class)} is not mapped: add it to tiles.truth.mapping, or leave such boxes "
                "out with other_classes: drop"
            )
        image.boxes.append(row.box)
        image.class_ids.append(target)
        image.crowd.append(row.crowd)
        image.rows.append(number)


def read_truth(source: TruthSource, classes: tuple[str, ...]) -> TruthSet:
    """Read a truth source; each bad row is rejected by itself, whatever the rest is.

    A class without any row is no error: a later file may have some. A class that this format and mapping cannot
    produce is one. Boxes are checked against their image later (`SceneTruth.fitted`), when its size is known.

    Raises:
        TruthError: The file is missing or broken, the mapping names a class that the source does not have, or one of
            ``classes`` has no source class. Nothing else is raised, whatever the files contain.
    """
    readers = {"xview": _read_xview, "coco": _read_coco, "yolo": _read_yolo, "dota": _read_dota}
    return readers[source.format](source, classes)


def truth_digest(source: TruthSource) -> str:
    """Digest of all files that a truth source consists of.

    Raises:
        TruthError: They cannot be found or read.
    """
    path = Path(source.path)
    if source.format == "dota":
        files = _dota_files(path)
    else:
        labels = _yolo_images(path, _load_yaml(path)).values() if source.format == "yolo" else ()
        files = [path, *(label for label, _ in labels if os.path.isfile(label))]
    try:
        return store.digest([(file.name, store.file_digest(file)) for file in files])
    except (OSError, ValueError) as error:
        raise TruthError(f"cannot read the truth at {path} ({_one_line(error)}): correct tiles.truth.path") from None


def match_scenes(names: Collection[str], scene_ids: Iterable[str]) -> dict[str, str]:
    """Which scene each image name of a truth source means: the one of that path, else the one of that file name.

    A name without an image suffix (DOTA) matches without it. Where several scenes or several names share a file name,
    one path must end in the other. A name that does not mean exactly one scene is left out, and so are two that mean
    the same one.
    """
    by_stem: dict[str, list[PurePosixPath]] = defaultdict(list)
    for scene_id in scene_ids:
        by_stem[_without_suffix(PurePosixPath(scene_id)).name].append(PurePosixPath(scene_id))
    namesakes = Counter(PurePosixPath(name).name for name in names)
    found = {name: _match(PurePosixPath(name), by_stem, namesakes) for name in names}
    claims = Counter(scene for scene, _ in found.values())
    return {name: str(scene) for name, (scene, exact) in found.items() if scene and (exact or claims[scene] == 1)}


def _match(
    name: PurePosixPath, by_stem: dict[str, list[PurePosixPath]], namesakes: Counter[str]
) -> tuple[PurePosixPath | None, bool]:
    """The one scene that ``name`` means, if there is one, and whether by its whole path."""
    bare = _without_suffix(name) == name
    paths = {scene: _without_suffix(scene) if bare else scene for scene in by_stem.get(_without_suffix(name).name, ())}
    exact = [scene for scene, path in paths.items() if path == name]
    best = exact or [scene for scene, path in paths.items() if path.name == name.name]
    if not exact and (len(best) > 1 or namesakes[name.name] > 1):
        best = [scene for scene in best if _ends_alike(paths[scene].parts, name.parts)]
    return (best[0], bool(exact)) if len(best) == 1 else (None, False)


def _ends_alike(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]


def _without_suffix(path: PurePosixPath) -> PurePosixPath:
    return path.with_suffix("") if path.suffix.lower() in _IMAGES else path


def _read_xview(source: TruthSource, classes: tuple[str, ...]) -> TruthSet:
    features = _lists(_load_json(source.path), ("features",), source.path)[0]
    collector = _collector(source, classes, XVIEW_CLASSES)
    collector.read(source.path, enumerate(features), _xview_row)
    return collector.done()


def _xview_row(raw: Any) -> _Row:
    properties = _object(_object(raw, "the feature").get("properties"), "properties")
    image = _image_name(properties.get("image_id"), "image_id")
    bounds = _text(properties.get("bounds_imcoords"), "bounds_imcoords").split(",")
    box = _box(*_numbers(bounds, 4, "bounds_imcoords"))
    return _Row(image, _whole(properties.get("type_id"), "type_id"), box)


def _read_coco(source: TruthSource, classes: tuple[str, ...]) -> TruthSet:
    lists = _lists(_load_json(source.path), ("images", "annotations", "categories"), source.path)
    images, annotations, categories = lists
    known, bad_categories = _coco_categories(source.path, categories)
    collector = _collector(source, classes, known)
    collector.rejected += bad_categories
    names = _coco_images(source.path, images, collector, known)
    rows = ((_coco_number(raw, index), raw) for index, raw in enumerate(annotations))
    collector.read(source.path, rows, partial(_coco_row, names))
    return collector.done()


def _coco_categories(path: str, categories: list[Any]) -> tuple[dict[int, str], list[RejectedTruth]]:
    known: dict[int, str] = {}
    rejected = []
    for index, raw in enumerate(categories):
        try:
            category_id = _whole(_object(raw, "the category").get("id"), "id")
            if category_id in known:
                raise _BadRow(f"category id {category_id} is there twice")
            known[category_id] = _text(raw.get("name"), "name")
        except _BadRow as reason:
            rejected.append(RejectedTruth(path, None, f"category {index}: {reason}"))
    return known, rejected


def _coco_images(path: str, images: list[Any], collector: _Collector, known: dict[int, str]) -> dict[int | str, str]:
    """Image id to name; puts each image into the collector, so that those without boxes are there too."""
    names: dict[int | str, str] = {}
    for index, raw in enumerate(images):
        try:
            image_id, name = _coco_image_id(_object(raw, "the image").get("id")), _image_name(raw.get("file_name"))
            if image_id in names or name in collector.images:
                raise _BadRow(f"image {_show(image_id)} or its file {_show(name)} is there twice")
            facts = {key: _label(raw.get(key), key) for key in ("group", "split")}
            labelled = _coco_labelled(raw.get("labelled_categories"), known, collector)
            collector.image(name, file=path, size_wh=_coco_size(raw), labelled_classes=labelled, **facts)
            names[image_id] = name
        except _BadRow as reason:
            collector.reject(path, None, f"image {index}: {reason}")
    return names


def _coco_labelled(listed: Any, known: dict[int, str], collector: _Collector) -> tuple[int, ...] | None:
    """Our classes that are drawn in an image: those all of whose source classes are listed, by name or id."""
    if listed is None:
        return None
    entries = {entry for entry in listed if isinstance(entry, int | str)} if isinstance(listed, list) else set()
    if not isinstance(listed, list) or not all(_is_in(entry, {*known, *known.values()}) for entry in listed):
        raise _BadRow(f"labelled_categories {_show(listed)} must be a list of categories, by name or id")
    sources: dict[int, list[int]] = defaultdict(list)
    for key in known:
        if (target := collector.targets[key]) is not None:
            sources[target].append(key)
    complete = (target for target, keys in sources.items() if all({key, known[key]} & entries for key in keys))
    return tuple(sorted(complete))


def _coco_image_id(value: Any) -> int | str:
    return value if isinstance(value, str) else _whole(value, "image id")


def _coco_size(raw: dict) -> tuple[int, int] | None:
    if raw.get("width") is None or raw.get("height") is None:
        return None
    return _whole(raw["width"], "width"), _whole(raw["height"], "height")


def _coco_number(raw: Any, index: int) -> int:
    number = raw.get("id") if isinstance(raw, dict) else None
    return number if isinstance(number, int) and 0 <= number < 2**63 and not isinstance(number, bool) else index


def _coco_row(names: dict[int | str, str], raw: Any) -> _Row:
    image_id = _coco_image_id(_object(raw, "the annotation").get("image_id"))
    if image_id not in names:
        raise _BadRow(f"no image has id {_show(image_id)}")
    x, y, width, height = _numbers(raw.get("bbox"), 4, "bbox")
    crowd = _whole(raw.get("iscrowd") or 0, "iscrowd") != 0
    source_class = _whole(raw.get("category_id"), "category_id")
    return _Row(names[image_id], source_class, _box(x, y, x + width, y + height), crowd)


def _read_yolo(source: TruthSource, classes: tuple[str, ...]) -> TruthSet:
    path = Path(source.path)
    data = _load_yaml(path)
    listed = data.get("names")
    known = dict(enumerate(listed)) if isinstance(listed, list) else listed
    if not isinstance(known, dict) or not all(type(key) is int and isinstance(known[key], str) for key in known):
        raise TruthError(f"{path} needs `names`, a list of class names or a mapping from number to name")
    collector = _collector(source, classes, known)
    for label, image in _yolo_images(path, data).values():
        collector.image(image, file=str(label), normalised=True)
        if os.path.isfile(label):  # an image without a label file is background, by YOLO's convention
            _read_lines(collector, label, partial(_yolo_row, image))
    return collector.done()


def _yolo_images(path: Path, data: dict) -> dict[str, tuple[Path, str]]:
    """Label file and image name (below the data set's folder) of each image in train, val and test."""
    folder = data.get("path") or "."
    if not isinstance(folder, str):
        raise TruthError(f"{path}: path must be a folder, it is {_show(folder)}")
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
            raise TruthError(f"{path}: train, val and test must be paths, one is {_show(entry)}")
        # Roboflow writes ../train/images and puts the folder beside data.yaml.
        candidates = (root / entry, root / entry.removeprefix("../"))
        place = next((place for place in candidates if os.path.exists(place)), None)
        if place is None:
            raise TruthError(f"{path} names {_show(entry)}, not found in {root}: correct its path, train, val or test")
        yield from _yolo_listed(root, place)


def _yolo_listed(root: Path, place: Path) -> list[Path]:
    """The images of a folder, sorted, or those that a txt file lists."""
    if os.path.isdir(place):
        paths = (Path(folder, name) for folder, _, names in os.walk(place) for name in names)
        return sorted(image for image in paths if image.suffix.lower() in _IMAGES)
    lines = (line.strip() for line in _load(place, str.splitlines, "text"))
    return [root / line for line in lines if line]


def _yolo_label(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt") if image.name else image


def _yolo_row(image: str, line: str) -> _Row:
    parts = line.split()
    if len(parts) != 5:
        raise _BadRow(f"needs a class and four numbers, has {len(parts)} values (polygons are not read)")
    x, y, width, height = _numbers(parts[1:], 4, "box")
    source_class = _whole(int(parts[0]) if parts[0].isdecimal() and len(parts[0]) < 19 else parts[0], "class")
    return _Row(image, source_class, _box(x - width / 2, y - height / 2, x + width / 2, y + height / 2))


def _read_dota(source: TruthSource, classes: tuple[str, ...]) -> TruthSet:
    root = Path(source.path)
    named = [str(key) for key in source.mapping] or list(classes)
    targets = _targets(source, classes, {name: name for name in (*DOTA_CLASSES, *named)})
    collector = _Collector(source.other_classes == "drop", targets)
    for file in _dota_files(root):
        image = file.relative_to(root).with_suffix("").as_posix()
        collector.image(image, file=str(file))
        _read_lines(collector, file, partial(_dota_row, image), skip=("imagesource", "gsd"))
    seen = {class_id for image in collector.images.values() for class_id in image.class_ids}
    sure = source.mapping or DOTA_CLASSES
    _require_all(source, classes, seen | {collector.targets[str(name)] for name in sure}, DOTA_CLASSES)
    return collector.done()


def _dota_files(root: Path) -> list[Path]:
    if not os.path.isdir(root):
        raise TruthError(f"no folder of DOTA txt files at {root}: correct tiles.truth.path")
    files = sorted(Path(folder, name) for folder, _, names in os.walk(root) for name in names if name.endswith(".txt"))
    if not files:
        raise TruthError(f"no .txt file in {root}: set tiles.truth.path to the folder of DOTA labels")
    return files


def _dota_row(image: str, line: str) -> _Row:
    parts = line.split()
    if len(parts) not in (9, 10):
        raise _BadRow(f"needs eight numbers, a class and difficult, has {len(parts)} values")
    corners = _numbers(parts[:8], 8, "corners")
    xs, ys = corners[::2], corners[1::2]
    difficult = parts[9] if len(parts) == 10 else "0"
    if difficult not in ("0", "1", "2"):
        raise _BadRow(f"difficult must be 0 or 1, it is {_show(difficult)}")
    return _Row(image, parts[8], _box(min(xs), min(ys), max(xs), max(ys)), difficult != "0")


def _read_lines(collector: _Collector, file: Path, parse: Callable[[str], _Row], skip: tuple[str, ...] = ()) -> None:
    """Every line of a label file but empty ones and headers; an unreadable file is one rejection."""
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except (OSError, ValueError) as error:
        collector.reject(str(file), None, f"cannot be read: {_one_line(error)}")
        return
    rows = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    wanted = ((number, line) for number, line in rows if line and not line.lower().startswith(skip or ("\0",)))
    collector.read(str(file), wanted, parse)


def _collector(source: TruthSource, classes: tuple[str, ...], known: dict[int, str]) -> _Collector:
    """A collector for a source that lists its classes."""
    names = {str(key) for key in known} | set(known.values())
    numbers = {str(key): int(key) for key in source.mapping if str(key).isdecimal()}
    strange = [str(key) for key in source.mapping if str(key) not in names and str(key) not in numbers]
    if strange:
        has = ", ".join(list(known.values())[:10])
        raise TruthError(f"tiles.truth.mapping names {', '.join(strange)}, {source.path} has {has}, ...: correct it")
    extra = {number: "" for key, number in numbers.items() if key not in names}
    targets = _targets(source, classes, {**known, **extra})
    _require_all(source, classes, set(targets.values()), known.values())
    return _Collector(source.other_classes == "drop", targets)


def _targets(
    source: TruthSource, classes: tuple[str, ...], known: Mapping[int, str] | Mapping[str, str]
) -> dict[int | str, int | None]:
    """Source class (id or, in DOTA, name) to our class; None for a known class that is not mapped."""
    mapping = {str(key): name for key, name in source.mapping.items()}
    targets: dict[int | str, int | None] = {}
    for key, name in known.items():
        ours = mapping.get(str(key), mapping.get(name)) if mapping else name
        targets[key] = classes.index(ours) if ours in classes else None
    return targets


def _require_all(
    source: TruthSource, classes: tuple[str, ...], made: Collection[int | None], known: Iterable[str]
) -> None:
    missing = [name for index, name in enumerate(classes) if index not in made]
    if missing:
        raise TruthError(
            f"class without mapping: nothing in {source.path} can become {', '.join(missing)}: add it to "
            f"tiles.truth.mapping (the source has {', '.join(list(known)[:10])}, ...) or take it out of classes"
        )


def _load(path: Path | str, parse: Callable[[str], Any], kind: str) -> Any:
    try:
        return parse(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise TruthError(f"no truth file at {path}: correct tiles.truth.path") from None
    except _UNREADABLE as error:
        raise TruthError(f"{path} cannot be read as {kind} ({_one_line(error)}): get an unbroken copy") from None


def _load_json(path: str) -> Any:
    return _load(path, json.loads, "JSON")


def _load_yaml(path: Path) -> dict:
    data = _load(path, yaml.safe_load, "YAML")
    if not isinstance(data, dict):
        raise TruthError(f"{path} must be a mapping with names, train and val, it is {_show(data)}")
    return data


def _lists(data: Any, keys: Sequence[str], path: str) -> list[list[Any]]:
    lists: list[Any] = [data.get(key) for key in keys] if isinstance(data, dict) else []
    if not lists or not all(isinstance(value, list) for value in lists):
        raise TruthError(f"{path} must be a JSON object with the lists {', '.join(keys)}: check tiles.truth.format")
    return lists


def _object(value: Any, what: str) -> dict:
    if not isinstance(value, dict):
        raise _BadRow(f"{what} must be an object, it is {_show(value)}")
    return value


def _text(value: Any, what: str) -> str:
    try:
        if isinstance(value, str) and value and value.encode():  # half a surrogate pair cannot be written anywhere
            return value
    except UnicodeEncodeError:
        pass
    raise _BadRow(f"{what} must be a text, it is {_show(value)}")


def _image_name(value: Any, what: str = "file_name") -> str:
    path = PurePosixPath(_text(value, what))
    if not path.name:
        raise _BadRow(f"{what} {_show(value)} names no file")
    return str(path)


def _label(value: Any, what: str) -> str | None:
    if value is None:
        return None
    return _text(value, what) if isinstance(value, str) else str(_whole(value, what))


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise _BadRow(f"{what} must be a whole number, it is {_show(value)}")
    return value


def _numbers(values: Any, count: int, what: str) -> list[float]:
    if not isinstance(values, list) or len(values) != count or any(isinstance(value, bool) for value in values):
        raise _BadRow(f"{what} must be {count} numbers, it is {_show(values)}")
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise _BadRow(f"{what} must be {count} numbers, not all of its values are") from None


def _box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
    if not all(abs(value) <= _FAR_PX for value in (x0, y0, x1, y1)):  # false for NaN too
        raise _BadRow("coordinates must be finite and below 1e9 px")
    if x1 < x0 or y1 < y0:
        raise _BadRow(f"inverted box {x0:g},{y0:g},{x1:g},{y1:g}")
    if x1 == x0 or y1 == y0:
        raise _BadRow(f"box without area {x0:g},{y0:g},{x1:g},{y1:g}")
    return x0, y0, x1, y1


def _is_in(value: Any, known: set[int | str]) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool) and value in known


def _show(value: Any) -> str:
    """A value in an error message, short; never raises, as repr does on huge or deeply nested ones."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a number beyond 64 bits"
    return repr(value)[:60]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
