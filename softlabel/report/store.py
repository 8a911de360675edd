"""What a soft-label store holds: counted in one pass over its shards, and said in words. No pixels here.

Shape suffixes: T counts labelled tiles of a shard, N their boxes, K classes, B bins, H thresholds, of which the first
is the store's own floor: every box.
"""

import heapq
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.records import EMPTY, LABELLED, REJECTED, Detections, detections_from_row
from softlabel.report import wording
from softlabel.store import digest

THRESHOLDS = (0.1, 0.3, 0.5)
NUM_BINS = 100
"""Of the histograms of best scores over [0, 1]."""

_MAX_REASONS = 1000
_OTHER_REASONS = "(other reasons)"
_SHOWN_REASONS = 10


@dataclass(frozen=True)
class DoubtfulTile:
    """A tile worth a person's look, with every box that it got."""

    tile_id: str
    doubt: float
    detections: Detections

    @property
    def order(self) -> tuple[float, str]:
        """Sorts the most doubtful first, equally doubtful ones by name."""
        return -self.doubt, self.tile_id


@dataclass
class Reason:
    """Rejected tiles with the same reason, apart from the scene's name and the numbers in it."""

    example: str
    tiles: int = 0
    retryable: int = 0


class Tally:
    """The counts of a store, filled shard by shard; its size does not depend on the number of tiles.

    Attributes:
        labelled, empty, rejected, saturated: Tiles.
        boxes_HK: Boxes with their best score above each threshold, by best class.
        empty_H: Labelled tiles with no box above each threshold.
        histograms_KB: Best scores in 100 bins of equal width over [0, 1], by best class.
        reasons: By the reason without scene name and numbers.
        doubtful: The ``num_doubtful`` most doubtful tiles, worst first; tiles without doubt are never among them.
    """

    def __init__(self, num_classes: int, num_doubtful: int) -> None:
        self._num_doubtful = num_doubtful
        self.labelled = self.empty = self.rejected = self.saturated = 0
        self.boxes_HK = np.zeros((1 + len(THRESHOLDS), num_classes), np.int64)
        self.empty_H = np.zeros(1 + len(THRESHOLDS), np.int64)
        self.histograms_KB = np.zeros((num_classes, NUM_BINS), np.int64)
        self.reasons: dict[str, Reason] = {}
        self.doubtful: list[DoubtfulTile] = []

    @property
    def requested(self) -> int:
        """Tiles asked for."""
        return self.labelled + self.empty + self.rejected

    @property
    def shown_above(self) -> float:
        """The threshold above which boxes are shown: 0.1, below which most are noise, or 0 where none passes that."""
        return THRESHOLDS[0] if self.boxes_HK[1].any() else 0.0

    def add(self, table: pa.Table) -> None:
        """Count the soft-label rows (softlabel.records) of one shard."""
        labelled = table.filter(pc.equal(table["status"], LABELLED))
        self.labelled += len(labelled)
        self.empty += pc.sum(pc.equal(table["status"], EMPTY)).as_py() or 0
        self.saturated += pc.sum(labelled["saturated"]).as_py() or 0
        self._add_rejected(table.filter(pc.equal(table["status"], REJECTED)))
        tiles_N = np.repeat(np.arange(len(labelled)), pc.list_value_length(labelled["boxes"]).to_numpy())
        scores_NK = _score_matrix(labelled["scores"], len(self.histograms_KB))
        best_N, class_ids_N = scores_NK.max(axis=1), scores_NK.argmax(axis=1)
        self._add_boxes(tiles_N, best_N, class_ids_N, len(labelled))
        self._add_doubtful(labelled, doubts(tiles_N, best_N, len(labelled)))

    def _add_boxes(
        self, tiles_N: NDArray[np.int64], best_N: NDArray[np.float32], class_ids_N: NDArray[np.int64], num_tiles: int
    ) -> None:
        num_classes = len(self.histograms_KB)
        above_HN = [np.ones(len(best_N), bool), *(best_N > np.float32(threshold) for threshold in THRESHOLDS)]
        for i, above_N in enumerate(above_HN):
            self.boxes_HK[i] += np.bincount(class_ids_N[above_N], minlength=num_classes)
            self.empty_H[i] += num_tiles - len(np.unique(tiles_N[above_N]))
        bins_N = np.minimum(best_N.astype(np.float64) * NUM_BINS, NUM_BINS - 1).astype(np.int64)
        flat = np.bincount(class_ids_N * NUM_BINS + bins_N, minlength=num_classes * NUM_BINS)
        self.histograms_KB += flat.reshape(num_classes, NUM_BINS)

    def _add_doubtful(self, labelled: pa.Table, doubts_T: NDArray[np.float64]) -> None:
        tile_ids = labelled["tile_id"].to_pylist()
        order = heapq.nsmallest(
            self._num_doubtful, ((-doubts_T[i], tile_ids[i], int(i)) for i in np.flatnonzero(doubts_T))
        )
        if len(self.doubtful) == self._num_doubtful:
            order = [entry for entry in order if entry[:2] < self.doubtful[-1].order]
        found = [
            DoubtfulTile(tile_id, -negative, detections_from_row(labelled.slice(i, 1).to_pylist()[0]))
            for negative, tile_id, i in order
        ]
        both = (*self.doubtful, *found)
        self.doubtful = heapq.nsmallest(self._num_doubtful, both, key=lambda tile: tile.order)

    def _add_rejected(self, rejected: pa.Table) -> None:
        self.rejected += len(rejected)
        for row in rejected.select(["tile_id", "reason", "retryable"]).to_pylist():
            key = reason_group(row["reason"], row["tile_id"])
            if key not in self.reasons and len(self.reasons) >= _MAX_REASONS:
                key = _OTHER_REASONS
            reason = self.reasons.setdefault(key, Reason(row["reason"]))
            reason.tiles += 1
            reason.retryable += row["retryable"]


def doubts(tiles_N: NDArray[np.int64], best_N: NDArray[np.float32], num_tiles: int) -> NDArray[np.float64]:
    """How doubtful each tile is (T,), in boxes: the sum over its boxes of min(s, 1 - s), s the best class's score.

    If scores were probabilities, this would be how many of the tile's boxes a cut at 0.5 is expected to get wrong. A
    box at 0.5 counts half a box, a sure one and one near the floor next to nothing, so that the hundreds of boxes just
    above a low floor do not drown the rest (as they would with entropy). Crowded tiles come first: there, one look
    settles most. An object that got no box at all adds no doubt.
    """
    return np.asarray(np.bincount(tiles_N, np.minimum(best_N, 1 - best_N), num_tiles), np.float64)


def reason_group(reason: str, tile_id: str) -> str:
    """A reason without what differs from tile to tile: the scene's path or name, and every word with a digit in it."""
    scene_name = re.escape(tile_id.rpartition("#")[0].rpartition("/")[2])
    without_scene = re.sub(rf"(?<=\bscene )\S.*?{scene_name}|\S*{scene_name}", "SCENE", reason)
    return re.sub(r"\w*\d\w*(\.\d\w*)*", "N", without_scene)


def teacher_facts(teacher: dict) -> dict[str, str]:
    """The fingerprint of a teacher, of several fused, or of one whose class was split, as names and words; classes are
    listed elsewhere."""
    left_out = ("fused", "classes", "versions", "class_map", "subtyped", "by", "class")
    facts = {key: wording.plain(value) for key, value in teacher.items() if key not in left_out}
    if "class_map" in teacher:
        facts["class_map"] = _mapped(teacher["class_map"])
    if "subtyped" in teacher:
        facts = {**teacher_facts(teacher["subtyped"]), **facts}
        facts[f"{teacher['class']} split by"] = teacher["by"]["attribute"]
    for i, fused in enumerate(teacher.get("fused", ()), start=1):
        facts[f"teacher {i}"] = ", ".join(f"{key} {value}" for key, value in teacher_facts(fused).items())
    return facts


def _mapped(class_map: dict[str, str | None]) -> str:
    becomes = [f"{name} → {wanted}" for name, wanted in class_map.items() if wanted is not None]
    return "; ".join([", ".join(becomes), f"{len(class_map) - len(becomes)} left out"])


def box_table(tally: Tally, teacher: dict) -> list[list[str]]:
    """Boxes by best class and threshold in words: a header, a row per class, all classes, tiles without a box."""
    floor = teacher.get("nms", {}).get("floor")
    header = ["best class", "all" if floor is None else f"> {floor:g} (floor)"]
    rows = [[name, *map(wording.plain, counts)] for name, counts in zip(teacher["classes"], tally.boxes_HK.T.tolist())]  # noqa: B905
    return [
        [*header, *(f"> {threshold:g}" for threshold in THRESHOLDS)],
        *rows,
        ["all classes", *map(wording.plain, tally.boxes_HK.sum(axis=1).tolist())],
        ["tiles without a box", *(percent(count, tally.labelled) for count in tally.empty_H.tolist())],
    ]


def tile_counts(tally: Tally) -> dict[str, str]:
    """Tiles asked for and what became of them, in words."""
    return {
        "tiles asked for": wording.plain(tally.requested),
        "labelled": wording.plain(tally.labelled),
        **({"empty": f"{wording.plain(tally.empty)} (no valid pixel)"} if tally.empty else {}),
        "rejected": f"{wording.plain(tally.rejected)} ({percent(tally.rejected, tally.requested)})",
        "saturated": f"{wording.plain(tally.saturated)} (boxes cut off at max_det)",
    }


def top_reasons(tally: Tally) -> tuple[list[Reason], str]:
    """The ten most frequent reasons, and what to say of the rest: empty if there are no more."""
    reasons = sorted(tally.reasons.values(), key=lambda reason: (-reason.tiles, reason.example))
    rest = reasons[_SHOWN_REASONS:]
    tiles = sum(reason.tiles for reason in rest)
    return reasons[:_SHOWN_REASONS], f"{wording.plain(tiles)} tiles for {len(rest)} other reasons" if rest else ""


def format_store(name: str, teacher: dict, tally: Tally) -> str:
    """The store as aligned plain text for a terminal."""
    facts = {"store": name, **teacher_facts(teacher), **tile_counts(tally)}
    width = max(map(len, facts))
    lines = [f"{key:<{width}}  {value}" for key, value in facts.items()]
    return "\n".join([*lines, "", *_aligned(box_table(tally, teacher)), *_reason_lines(tally)])


def coco(tiles: Iterable[tuple[dict, Detections]], classes: Sequence[str]) -> dict[str, Any]:
    """Soft labels as a COCO document.

    Args:
        tiles: Per tile its COCO image entry without the id, and its boxes.
        classes: In the order of the class vectors; category ids count from 1, as labelling tools expect.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    annotation_ids = itertools.count(1)
    for image_id, (image, found) in enumerate(tiles, start=1):
        images.append({"id": image_id, **image})
        for box, class_id, score in zip(found.boxes.tolist(), found.class_ids.tolist(), found.best, strict=True):
            x, y, width, height = (round(value, 3) for value in (*box[:2], box[2] - box[0], box[3] - box[1]))
            annotations.append(
                {
                    "id": next(annotation_ids),
                    "image_id": image_id,
                    "category_id": class_id + 1,
                    "bbox": [x, y, width, height],
                    "area": round(width * height, 3),
                    "segmentation": [],
                    "iscrowd": 0,
                    "score": round(float(score), 4),
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    return {"info": {"description": "soft labels to correct", "digest": digest(document)}, **document}


def is_as_written(document: dict) -> bool:
    """Whether a document of `coco` is unchanged since it was made."""
    content = {key: value for key, value in document.items() if key != "info"}
    return document.get("info", {}).get("digest") == digest(content)


def percent(count: int, total: int) -> str:
    """A share for people, an en dash where the total is 0."""
    return f"{100 * count / total:.1f} %" if total else wording.NULL


def _score_matrix(scores: pa.ChunkedArray, num_classes: int) -> NDArray[np.float32]:
    """The class vectors of all boxes of a shard (N, K)."""
    return scores.combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, num_classes)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose first column is words and whose last two rows are totals."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:-2], rule, *lines[-2:]]


def _reason_lines(tally: Tally) -> list[str]:
    shown, rest = top_reasons(tally)
    if not shown:
        return []
    rows = [f"{wording.plain(r.tiles):>7}  {wording.plain(r.retryable):>9}  {r.example}" for r in shown]
    header = f"{'rejected':>8} {'retryable':>9}  reason (one example of each kind)"
    return ["", header, *rows, *([rest] if rest else [])]
