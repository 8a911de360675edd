"""Detections matched with truth by COCO's rules (hotcoco, equal to pycocotools): what every number is counted from.

A box counts for its best class; per tile and class, detections go by descending score, at most 1,000, and each takes
the free truth box of highest IoU. Ignored truth goes in as ``iscrowd=1``: detections in it are neither rewarded nor
punished. In a tile that was not labelled for a class, neither truth nor detections of that class count.

Where truth was drawn rotated and the detector finds rotated boxes, IoU is that of the polygons (as the DOTA benchmark
has it); where only one of them is rotated, that of the upright hulls.

Shape suffixes: T tiles, N detections, M truth boxes, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from hotcoco import COCO, COCOeval
from numpy.typing import NDArray

from softlabel import rotated
from softlabel.records import UNKNOWN_CLASS, Detections, Truth

MAX_DETECTIONS = 1000
"""COCO maxDets, per tile and class; labelling keeps no more than this per tile."""
_EVERYWHERE = [0.0, 1e10]


@dataclass(frozen=True)
class TileResult:
    """Truth and detections of one tile, both in tile pixels; ``labelled_classes`` None means every class."""

    truth: Truth
    detections: Detections
    labelled_classes: tuple[int, ...] | None


@dataclass(frozen=True)
class Columns:
    """All tiles as columns, tile after tile, without the classes that a tile was not labelled for.

    Attributes:
        tile: (N,) index of each detection's tile.
        class_ids: (N,) its best class.
        scores: (N,) float32, the score of that class.
        boxes: (N, 4) float64 xyxy; or (N, 5) float64 xywhr (softlabel.rotated), where truth is rotated too.
        truth_tile: (M,) index of each truth box's tile; the other fields of truth likewise.
    """

    num_tiles: int
    num_classes: int
    tile: NDArray[np.int64]
    class_ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float64]
    truth_tile: NDArray[np.int64]
    truth_class_ids: NDArray[np.int64]
    truth_boxes: NDArray[np.float64]
    truth_ignore: NDArray[np.bool_]

    @property
    def rotated(self) -> bool:
        """Whether boxes are rotated, so that IoU is that of polygons."""
        return self.boxes.shape[1] == 5

    def truth_counts(self) -> NDArray[np.int64]:
        """(K,) truth boxes per class, ignored ones left out."""
        return np.bincount(self.truth_class_ids[~self.truth_ignore], minlength=self.num_classes)


@dataclass(frozen=True)
class Matches:
    """What became of each detection at one IoU threshold.

    Attributes:
        counted: (N,) bool, False for those in ignored truth and those beyond ``MAX_DETECTIONS``.
        truth: (N,) index of the truth box that it took, perhaps an ignored one; -1 if none.
    """

    counted: NDArray[np.bool_]
    truth: NDArray[np.int64]

    @property
    def found(self) -> NDArray[np.bool_]:
        """(N,) true positives."""
        return self.counted & (self.truth >= 0)


def to_columns(tiles: Sequence[TileResult], num_classes: int) -> Columns:
    """Lay tiles end to end; raises ValueError where class vectors or class ids do not fit ``num_classes``."""
    tiles = [replace(tile, truth=_of_every_class(tile.truth, num_classes)) for tile in tiles]
    tile = np.repeat(np.arange(len(tiles)), [len(t.detections.boxes) for t in tiles])
    class_ids = _concatenate([t.detections.class_ids for t in tiles], np.int64)
    truth_tile = np.repeat(np.arange(len(tiles)), [len(t.truth.boxes) for t in tiles])
    truth_class_ids = _concatenate([t.truth.class_ids for t in tiles], np.int64)
    _check_classes(tiles, truth_class_ids, num_classes)
    labelled = [_is_labelled(t.labelled_classes, num_classes) for t in tiles]
    labelled_TK = np.array(labelled, bool).reshape(-1, num_classes)
    keep, keep_truth = labelled_TK[tile, class_ids], labelled_TK[truth_tile, truth_class_ids]
    boxes, truth_boxes, empty = _boxes(tiles)
    return Columns(
        len(tiles),
        num_classes,
        tile[keep],
        class_ids[keep],
        _concatenate([t.detections.best for t in tiles], np.float32)[keep],
        _concatenate(boxes, np.float64, empty)[keep],
        truth_tile[keep_truth],
        truth_class_ids[keep_truth],
        _concatenate(truth_boxes, np.float64, empty)[keep_truth],
        _concatenate([t.truth.ignore for t in tiles], np.bool_)[keep_truth],
    )


def match(columns: Columns, iou_thresholds: Sequence[float]) -> list[Matches]:
    """COCO's greedy matching, once per IoU threshold.

    Detections are matched by descending score, so those above a threshold match as if the others were not there.
    """
    evaluator = evaluator_of(columns)
    return [match_at(evaluator, iou, len(columns.tile)) for iou in iou_thresholds]


def match_at(evaluator: COCOeval, iou: float, num_detections: int) -> Matches:
    """The matching at one IoU threshold, of an evaluator over ``num_detections``."""
    # One threshold at a time: eval_imgs makes Python lists, with ten thresholds at once ten times as many (0.34 s
    # instead of 0.05 s at 150,000 detections, and memory likewise).
    evaluator.params.iou_thrs = [iou]
    evaluator.evaluate()
    images = [image for image in evaluator.eval_imgs if image is not None and image["dtIds"]]
    rows = _chained([image["dtIds"] for image in images]) - 1
    counted = np.zeros(num_detections, bool)
    counted[rows] = _chained([image["dtIgnore"][0] for image in images]) == 0
    truth = np.full(num_detections, -1)
    truth[rows] = _chained([image["dtMatches"][0] for image in images]) - 1
    return Matches(counted, truth)


def evaluator_of(columns: Columns) -> COCOeval:
    """A hotcoco evaluator of the columns, not yet matched. COCO ids count from 1 in the order of the columns."""
    evaluator = _evaluator_of_rotated(columns) if columns.rotated else _evaluator_of_upright(columns)
    evaluator.params.max_dets = [MAX_DETECTIONS]
    evaluator.params.area_rng, evaluator.params.area_rng_lbl = [_EVERYWHERE], ["all"]
    return evaluator


def _images_and_categories(columns: Columns) -> tuple[list[dict], list[dict]]:
    images = [{"id": index + 1} for index in range(columns.num_tiles)]
    return images, [{"id": index + 1, "name": str(index)} for index in range(columns.num_classes)]


def _evaluator_of_upright(columns: Columns) -> COCOeval:
    truth = COCO.from_arrays(
        *_images_and_categories(columns),
        columns.truth_tile + 1,
        columns.truth_class_ids + 1,
        _xywh(columns.truth_boxes),
        iscrowd=columns.truth_ignore,
    )
    results = np.column_stack([columns.tile + 1, _xywh(columns.boxes), columns.scores, columns.class_ids + 1])
    return COCOeval(truth, truth.load_res(results), "bbox")


def _evaluator_of_rotated(columns: Columns) -> COCOeval:
    """For rotated boxes, which hotcoco takes only one by one."""
    images, categories = _images_and_categories(columns)
    annotations = _rows(
        id=np.arange(1, len(columns.truth_tile) + 1),
        image_id=columns.truth_tile + 1,
        category_id=columns.truth_class_ids + 1,
        obb=columns.truth_boxes,
        area=columns.truth_boxes[:, 2] * columns.truth_boxes[:, 3],
        iscrowd=columns.truth_ignore.astype(int),
    )
    truth = COCO({"images": images, "categories": categories, "annotations": annotations})
    results = _rows(
        image_id=columns.tile + 1, category_id=columns.class_ids + 1, obb=columns.boxes, score=columns.scores
    )
    return COCOeval(truth, truth.load_res(results), "obb")


def _rows(**columns: NDArray[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]


def _boxes(tiles: Sequence[TileResult]) -> tuple[list[Any], list[Any], tuple[int, int]]:
    """The boxes of detections and of truth, tile by tile, and the shape of an array without any."""
    found, truth = [t.detections for t in tiles], [t.truth for t in tiles]
    if not (_has_rotated(found) and _has_rotated(truth)):
        return [one.boxes for one in found], [one.boxes for one in truth], (0, 4)
    found_N5, truth_N5 = ([rotated.drawn(one.boxes, one.xywhr) for one in side] for side in (found, truth))
    return found_N5, truth_N5, (0, 5)


def _has_rotated(of_tiles: Sequence[Detections] | Sequence[Truth]) -> bool:
    return any(one.xywhr is not None for one in of_tiles)


def _of_every_class(truth: Truth, num_classes: int) -> Truth:
    """Repeat ignored truth of unknown class as ignored truth of every class."""
    unknown = (truth.class_ids == UNKNOWN_CLASS) & truth.ignore
    if not unknown.any():
        return truth
    times = np.where(unknown, num_classes, 1)
    repeated = truth.at(np.repeat(np.arange(len(times)), times))
    repeated.class_ids[np.repeat(unknown, times)] = np.tile(np.arange(num_classes), int(unknown.sum()))
    return repeated


def _is_labelled(labelled_classes: tuple[int, ...] | None, num_classes: int) -> NDArray[np.bool_]:
    if labelled_classes is None:
        return np.ones(num_classes, bool)
    return np.isin(np.arange(num_classes), labelled_classes)


def _check_classes(tiles: Sequence[TileResult], truth_class_ids: NDArray[np.int64], num_classes: int) -> None:
    widths = {t.detections.scores.shape[1] for t in tiles if len(t.detections.boxes)}
    if widths - {num_classes}:
        raise ValueError(f"class vectors have {sorted(widths)} entries, there are {num_classes} classes")
    if len(truth_class_ids) and not 0 <= truth_class_ids.min() <= truth_class_ids.max() < num_classes:
        found = f"{truth_class_ids.min()}..{truth_class_ids.max()}"
        raise ValueError(f"truth class ids run over {found}, there are {num_classes} classes")


def _concatenate(parts: list[Any], dtype: Any, empty: tuple[int, ...] = (0,)) -> NDArray[Any]:
    return np.concatenate([np.zeros(empty, dtype), *parts]).astype(dtype, copy=False)


def _chained(parts: list[list[int]]) -> NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(parts), np.int64)


def _xywh(boxes_N4: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], axis=1)
