"""Boxes that people drew, read from xView GeoJSON, COCO JSON, YOLO txt or DOTA txt.

truth_formats.py and truth_yolo.py have one reader per format. Boxes are xyxy (N, 4), x right, y down, max edges
exclusive, in scene pixels (YOLO gives shares of the image: `SceneTruth.fitted`).
"""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from softlabel import boxes as box_math
from softlabel import rotated, store
from softlabel.config import TruthSource
from softlabel.errors import TruthError
from softlabel.imagery.truth_collector import Image
from softlabel.imagery.truth_fields import IMAGE_SUFFIXES, load_yaml, one_line
from softlabel.imagery.truth_formats import dota_files, read_coco, read_dota, read_xview
from softlabel.imagery.truth_yolo import read_yolo, yolo_images
from softlabel.records import UNKNOWN_CLASS
from softlabel.storage import is_remote, location

_MIN_SIDE_PX = 0.01  # anything thinner is a slip of the mouse, and would lose its area in float32 tile pixels


@dataclass(frozen=True)
class RejectedTruth:
    """A row that cannot be used. ``row`` is as in `SceneTruth.rows`; None where it is the whole file."""

    file: str
    row: int | None
    reason: str


@dataclass(frozen=True)
class SceneTruth:
    """The truth of one image. ``boxes`` (N, 4) float64; ``class_ids`` (N,) int32 index the recipe's classes, and are -1
    where the class cannot be used.

    ``crowd`` (N,) bool marks those, COCO crowds and DOTA's difficult ones: they are ignored. ``rows`` (N,) int64 lead
    back into ``file``: the feature's index (xView), the annotation's id or else index (COCO), the line from 1 (YOLO,
    DOTA). ``labelled_classes`` None means all. ``normalised``: boxes are shares of the image, in [0, 1]. ``xywhr``
    (N, 5) float64 are the rotated boxes (softlabel.rotated) whose bounding boxes are ``boxes``; None where the source
    has upright ones.
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
    xywhr: NDArray[np.float64] | None = None

    def fitted(self, width: int, height: int) -> tuple["SceneTruth", list[RejectedTruth]]:
        """The truth in pixels of its image; boxes partly outside are clipped to it, those wholly outside rejected."""
        scale = np.array([width, height] * 2, np.float64) if self.normalised else 1.0
        clipped = box_math.clip(self.boxes * scale, (0, 0, width, height)).astype(np.float64)
        inside = ((clipped[:, 2:] - clipped[:, :2]) >= _MIN_SIDE_PX).all(axis=1)
        reason = f"outside its image of {width}x{height} px, or thinner than {_MIN_SIDE_PX} px inside it"
        lost = ~inside & (self.class_ids != UNKNOWN_CLASS)  # the others are rejected already
        rejected = [RejectedTruth(self.file, int(row), reason) for row in self.rows[lost]]
        kept = {name: getattr(self, name)[inside] for name in ("class_ids", "crowd", "rows")}
        turned = None if self.xywhr is None else self.xywhr[inside]
        return replace(self, boxes=clipped[inside], normalised=False, xywhr=turned, **kept), rejected


@dataclass(frozen=True)
class TruthSet:
    """All truth of a source. ``scenes`` is keyed by image file name as the truth has it (DOTA: without a suffix).

    ``counts`` has ``rows`` (boxes of all kinds, each once), ``dropped`` (of known classes, left out on purpose:
    ``other_classes: drop``), ``duplicates`` (exact ones, beyond the first) and ``polygons`` (YOLO's, read as their
    boxes). ``warnings`` are for the user.
    """

    scenes: dict[str, SceneTruth]
    rejected: list[RejectedTruth]
    counts: Counter[str]
    warnings: list[str]


def read_truth(source: TruthSource, classes: tuple[str, ...]) -> TruthSet:
    """Read a truth source; each bad row is rejected on its own, whatever the rest is.

    A class without any row is not an error (a later file may have some); a class that this format and mapping cannot
    produce is. Boxes are checked against their image later (`SceneTruth.fitted`), when its size is known.

    Raises:
        TruthError: The file is missing or broken, the mapping names a class that the source does not have, or one of
            ``classes`` has no source class. Nothing else is raised, whatever the files contain.
    """
    readers = {"xview": read_xview, "coco": read_coco, "yolo": read_yolo, "dota": read_dota}
    found = readers[source.format](source, classes)
    scenes = {name: _scene_truth(image, len(classes)) for name, image in found.images.items()}
    return TruthSet(scenes, [RejectedTruth(*row) for row in found.rejected], found.counts, found.warnings)


def truth_digest(source: TruthSource) -> str:
    """Digest of all files that a truth source consists of.

    Raises:
        TruthError: They cannot be found or read.
    """
    path, names = location(source.path), list[str]()
    if is_remote(path) and source.format in ("dota", "yolo"):
        raise TruthError(
            f"{path}: {source.format} truth is a folder of files, and read from a disk alone: copy it there"
        )
    if source.format == "dota":
        files = dota_files(path)
    else:
        splits = yolo_images(path, load_yaml(path)).values() if source.format == "yolo" else ()
        labels = {label for images in splits for label, _ in images.values()}
        files = [path, *(label for label in sorted(labels) if os.path.isfile(label))]
        names = [name for images in splits for name in images]  # an image without a label file is background
    try:
        return store.digest([names, *((file.name, store.file_digest(file)) for file in files)])
    except (OSError, ValueError) as error:
        raise TruthError(f"cannot read the truth at {path} ({one_line(error)}): correct tiles.truth.path") from None


def match_scenes(names: Collection[str], scene_ids: Iterable[str]) -> dict[str, str]:
    """Which scene each image name of a truth source means: the one with that path, else the one with that file name.

    A name without an image suffix (DOTA) is compared without the scenes' suffixes. Where several scenes or names share
    a file name, one path must end in the other. A name that does not mean exactly one scene is left out, and so
    are two that mean the same one. What is left is matched once more by `plain_name`.
    """
    scenes = list(scene_ids)
    found = _match_all(names, scenes)
    taken = set(found.values())
    left = _by_plain_name(name for name in names if name not in found)
    free = _by_plain_name(scene for scene in scenes if scene not in taken)
    again = _match_all(list(left), list(free))
    return found | {left[name]: free[scene] for name, scene in again.items()}


def plain_name(name: str) -> str:
    """A name with what programs do to it undone: backslashes, percent-encoding, a query, other forms of Unicode."""
    path = unquote(name.replace("\\", "/"))
    return unicodedata.normalize("NFC", PurePosixPath(path.partition("?")[0]).as_posix())


def lookalike(name: str, scene_ids: Iterable[str]) -> str | None:
    """A scene whose file name a person would take for this one: equal but for case, blanks or Unicode forms (NFKC)."""
    return next((scene for scene in scene_ids if _looks(scene) == _looks(name)), None)


def _looks(name: str) -> str:
    folded = unicodedata.normalize("NFKC", plain_name(name)).casefold()
    return "".join(PurePosixPath(folded).name.split())


def _by_plain_name(names: Iterable[str]) -> dict[str, str]:
    """Map each plain name to its name, where only one name has it."""
    plain: dict[str, list[str]] = defaultdict(list)
    for name in names:
        plain[plain_name(name)].append(name)
    return {key: found[0] for key, found in plain.items() if len(found) == 1}


def _match_all(names: Collection[str], scene_ids: Iterable[str]) -> dict[str, str]:
    by_stem: dict[str, list[PurePosixPath]] = defaultdict(list)
    for scene_id in scene_ids:
        by_stem[_without_suffix(PurePosixPath(scene_id)).name].append(PurePosixPath(scene_id))
    namesakes = Counter(PurePosixPath(name).name for name in names)
    found = {name: _match(PurePosixPath(name), by_stem, namesakes) for name in names}
    claims = Counter(scene for scene, _ in found.values())
    return {name: str(scene) for name, (scene, exact) in found.items() if scene and (exact or claims[scene] == 1)}


def _scene_truth(image: Image, num_classes: int) -> SceneTruth:
    facts = dict(image.facts)
    if image.unsure:
        labelled = facts.get("labelled_classes")
        sure = range(num_classes) if labelled is None else labelled
        facts["labelled_classes"] = tuple(k for k in sure if not image.unsure & {k, UNKNOWN_CLASS})
    turned = [rotated.around(np.reshape(corners, (4, 2))) for corners in image.corners if corners is not None]
    return SceneTruth(
        xywhr=np.array(turned) if turned else None,  # a source has corners for every box, or for none
        boxes=np.array(image.boxes, np.float64).reshape(-1, 4),
        class_ids=np.array(image.class_ids, np.int32),
        crowd=np.array(image.crowd, bool),
        rows=np.array(image.rows, np.int64),
        **facts,
    )


def _match(
    name: PurePosixPath, by_stem: dict[str, list[PurePosixPath]], namesakes: Counter[str]
) -> tuple[PurePosixPath | None, bool]:
    """The one scene that ``name`` means, if there is one, and whether its whole path matches."""
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
    return path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path
