"""The one metric implementation: detections against truth, by COCO's rules (hotcoco, equal to pycocotools).

Every table, early stopping and the best epoch read these numbers (DESIGN, promise 7). One matching serves them all:
the best class per box; per tile and class by descending score, at most 1,000; each detection takes the free truth box
of highest IoU. Ignored truth goes in as ``iscrowd=1``: what lies in it neither rewards nor punishes. A class that a
tile was not labelled for does not exist there, neither its truth nor its detections. How good labels are and whether
two results differ is in quality.py.

Shape suffixes: T tiles, N detections, M truth boxes, K classes, C confidences.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from math import isnan, nan
from typing import Any

import numpy as np
from hotcoco import COCO, COCOeval
from numpy.typing import NDArray

from softlabel.records import Detections, Truth

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = 1000
"""COCO maxDets, per tile and class; labelling keeps no more than this per tile."""
CONFIDENCES = np.linspace(0, 1, 1001, dtype=np.float32)
"""The grid that curves are drawn on. The best F1 is sought among all scores, not on the grid."""
_EVERYWHERE = [0.0, 1e10]


@dataclass(frozen=True)
class TileResult:
    """What is known and what was found in one tile, both in tile pixels; ``labelled_classes`` None is every class."""

    truth: Truth
    detections: Detections
    labelled_classes: tuple[int, ...] | None


@dataclass(frozen=True)
class Metrics:
    """How well detections fit truth, all in [0, 1]; NaN where there is no truth to judge by.

    Attributes:
        map50: Mean over the classes that have truth of COCO's 101-point AP at IoU 0.5.
        map50_95: The same, averaged over IoU 0.5, 0.55, ... 0.95.
        precision: Mean over the same classes at IoU 0.5, of detections scored strictly above ``f1_conf``.
        recall: Likewise.
        f1: Likewise, the highest that any confidence reaches: the mean of the classes' F1, not the F1 of the means.
        f1_conf: Where it is reached, a float32 just below the lowest score kept; 0 where nothing matches.
        per_class: By class name, in the order of the classes: ap50, ap50_95, precision, recall, f1 (all NaN without
            truth; a class with truth of which nothing is kept has precision 0), truth and detections (counts).
        curves: By class name, for the classes with truth: ``recall`` and ``precision`` (101, COCO's interpolation at
            IoU 0.5); ``confidence`` (C), shared, and at it ``f1``, ``precision_at`` (NaN where nothing is kept) and
            ``recall_at``. ``all`` has the macro means of the last three.
    """

    map50: float
    map50_95: float
    precision: float
    recall: float
    f1: float
    f1_conf: float
    per_class: dict[str, dict[str, float]]
    curves: dict[str, dict[str, list[float]]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the curves, JSON-able: NaN is None."""
        values = asdict(self)
        del values["curves"]
        per_class = {name: _without_nan(row) for name, row in values.pop("per_class").items()}
        return {**_without_nan(values), "per_class": per_class}


@dataclass(frozen=True)
class Columns:
    """All tiles as columns, tile after tile, without the classes that a tile was not labelled for.

    Attributes:
        tile: (N,) index of each detection's tile.
        class_ids: (N,) its best class.
        scores: (N,) float32, the score of that class.
        boxes: (N, 4) float64 xyxy.
        truth_tile: (M,), and so on for truth.
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

    def truth_counts(self) -> NDArray[np.int64]:
        """(K,) truth boxes per class, ignored ones left out."""
        return np.bincount(self.truth_class_ids[~self.truth_ignore], minlength=self.num_classes)


@dataclass(frozen=True)
class Matches:
    """What became of each detection at one IoU threshold.

    Attributes:
        counted: (N,) bool, False for those in ignored truth and those beyond ``MAX_DETECTIONS``.
        truth: (N,) index of the truth box that it took, perhaps an ignored one; -1 for a false alarm.
    """

    counted: NDArray[np.bool_]
    truth: NDArray[np.int64]

    @property
    def found(self) -> NDArray[np.bool_]:
        """(N,) true positives."""
        return self.counted & (self.truth >= 0)


@dataclass(frozen=True)
class _ClassScores:
    """One class at IoU 0.5: the scores of its counted detections and of the true positives, ascending."""

    counted: NDArray[np.float32]
    found: NDArray[np.float32]
    truth: int

    def rates(self, confidences_C: NDArray[np.float32]) -> NDArray[np.float64]:
        """(4, C) of detections strictly above each confidence: precision (0 of none), recall, F1, how many."""
        kept = len(self.counted) - np.searchsorted(self.counted, confidences_C, side="right")
        found = len(self.found) - np.searchsorted(self.found, confidences_C, side="right")
        return np.stack([found / np.maximum(kept, 1), found / self.truth, 2 * found / (kept + self.truth), kept])


def evaluate(tiles: Sequence[TileResult], classes: tuple[str, ...]) -> Metrics:
    """Judge detections by truth. No tiles, no truth or no detections is no error: see Metrics.

    Args:
        tiles: In any order (it decides only between equal scores).
        classes: Names; class ids index them.

    Raises:
        ValueError: A class vector's length or a class id does not fit ``classes``.
    """
    columns = to_columns(tiles, len(classes))
    evaluator = _evaluator(columns)
    precision = _interpolated_precision(evaluator, columns)
    ap50, ap50_95 = precision[0].mean(axis=0), precision.mean(axis=(0, 1))
    scores = _scores_by_class(columns, _match_at(evaluator, 0.5, len(columns.tile)))
    f1_conf = _best_confidence(scores) if scores else nan
    rates = _rates_by_class(scores, np.array([f1_conf], np.float32), len(classes))[:3, :, 0]
    return Metrics(
        map50=_mean(ap50),
        map50_95=_mean(ap50_95),
        precision=_mean(rates[0]),
        recall=_mean(rates[1]),
        f1=_mean(rates[2]),
        f1_conf=f1_conf,
        per_class=_per_class(classes, np.stack([ap50, ap50_95, *rates]), columns),
        curves=_curves(classes, scores, precision[0]),
    )


def to_columns(tiles: Sequence[TileResult], num_classes: int) -> Columns:
    """Lay tiles end to end; raises ValueError where class vectors or class ids do not fit ``num_classes``."""
    tile = np.repeat(np.arange(len(tiles)), [len(t.detections.boxes) for t in tiles])
    class_ids = _concatenate([t.detections.class_ids for t in tiles], np.int64)
    truth_tile = np.repeat(np.arange(len(tiles)), [len(t.truth.boxes) for t in tiles])
    truth_class_ids = _concatenate([t.truth.class_ids for t in tiles], np.int64)
    _check_classes(tiles, truth_class_ids, num_classes)
    labelled = [_is_labelled(t.labelled_classes, num_classes) for t in tiles]
    labelled_TK = np.array(labelled, bool).reshape(-1, num_classes)
    keep, keep_truth = labelled_TK[tile, class_ids], labelled_TK[truth_tile, truth_class_ids]
    return Columns(
        len(tiles),
        num_classes,
        tile[keep],
        class_ids[keep],
        _concatenate([t.detections.best for t in tiles], np.float32)[keep],
        _concatenate([t.detections.boxes for t in tiles], np.float64, (0, 4))[keep],
        truth_tile[keep_truth],
        truth_class_ids[keep_truth],
        _concatenate([t.truth.boxes for t in tiles], np.float64, (0, 4))[keep_truth],
        _concatenate([t.truth.ignore for t in tiles], np.bool_)[keep_truth],
    )


def match(columns: Columns, iou_thresholds: Sequence[float]) -> list[Matches]:
    """COCO's greedy matching, once per IoU threshold.

    Detections go by descending score, so those above a threshold match as if the others were not there.
    """
    evaluator = _evaluator(columns)
    return [_match_at(evaluator, iou, len(columns.tile)) for iou in iou_thresholds]


def _match_at(evaluator: COCOeval, iou: float, num_detections: int) -> Matches:
    # One threshold at a time: eval_imgs makes Python lists, with ten thresholds at once ten times as many (0.34 s
    # instead of 0.05 s at 150,000 detections, and the memory).
    evaluator.params.iou_thrs = [iou]
    evaluator.evaluate()
    images = [image for image in evaluator.eval_imgs if image is not None and image["dtIds"]]
    rows = _chained([image["dtIds"] for image in images]) - 1
    counted = np.zeros(num_detections, bool)
    counted[rows] = _chained([image["dtIgnore"][0] for image in images]) == 0
    truth = np.full(num_detections, -1)
    truth[rows] = _chained([image["dtMatches"][0] for image in images]) - 1
    return Matches(counted, truth)


def _evaluator(columns: Columns) -> COCOeval:
    """Not yet matched. COCO ids count from 1 in the order of the columns."""
    truth = COCO.from_arrays(
        [{"id": index + 1} for index in range(columns.num_tiles)],
        [{"id": index + 1, "name": str(index)} for index in range(columns.num_classes)],
        columns.truth_tile + 1,
        columns.truth_class_ids + 1,
        _xywh(columns.truth_boxes),
        iscrowd=columns.truth_ignore,
    )
    results = np.column_stack([columns.tile + 1, _xywh(columns.boxes), columns.scores, columns.class_ids + 1])
    evaluator = COCOeval(truth, truth.load_res(results), "bbox")
    evaluator.params.max_dets = [MAX_DETECTIONS]
    evaluator.params.area_rng, evaluator.params.area_rng_lbl = [_EVERYWHERE], ["all"]
    return evaluator


def _interpolated_precision(evaluator: COCOeval, columns: Columns) -> NDArray[np.float64]:
    """(10, 101, K) precision by IoU, recall and class; NaN for a class without truth."""
    evaluator.params.iou_thrs = IOU_THRESHOLDS.tolist()
    evaluator.evaluate()
    evaluator.accumulate()
    accumulated: Any = evaluator.eval
    precision = np.asarray(accumulated["precision"], np.float64)[..., 0, 0]
    return np.where(columns.truth_counts() > 0, precision, nan)


def _scores_by_class(columns: Columns, matches: Matches) -> dict[int, _ClassScores]:
    """The classes that have truth, in order."""
    by_class = {}
    for class_id, truth in enumerate(columns.truth_counts().tolist()):
        if truth:
            of_class = columns.class_ids == class_id
            counted = np.sort(columns.scores[of_class & matches.counted])
            found = np.sort(columns.scores[of_class & matches.found])
            by_class[class_id] = _ClassScores(counted, found, truth)
    return by_class


def _best_confidence(scores: dict[int, _ClassScores]) -> float:
    """Where the macro F1 is highest, the lowest such. Exact: taking in false alarms alone only lowers it."""
    lowest_kept = np.unique(np.concatenate([one.found for one in scores.values()]))
    if len(lowest_kept) == 0:
        return 0.0
    candidates = np.nextafter(lowest_kept, np.float32(0))
    f1_sum = sum(one.rates(candidates)[2] for one in scores.values())
    return float(candidates[np.argmax(f1_sum)])


def _rates_by_class(
    scores: dict[int, _ClassScores], confidences_C: NDArray[np.float32], num_classes: int
) -> NDArray[np.float64]:
    """(4, K, C), NaN for a class without truth."""
    rates = np.full((4, num_classes, len(confidences_C)), nan)
    for class_id, one in scores.items():
        rates[:, class_id] = one.rates(confidences_C)
    return rates


def _per_class(classes: tuple[str, ...], rates: NDArray[np.float64], columns: Columns) -> dict[str, dict[str, float]]:
    names = ("ap50", "ap50_95", "precision", "recall", "f1")
    truth = columns.truth_counts().tolist()
    detections = np.bincount(columns.class_ids, minlength=len(classes)).tolist()
    return {
        name: {**dict(zip(names, rates[:, index].tolist(), strict=True)), "truth": t, "detections": d}
        for index, (name, t, d) in enumerate(zip(classes, truth, detections, strict=True))
    }


def _curves(
    classes: tuple[str, ...], scores: dict[int, _ClassScores], precision: NDArray[np.float64]
) -> dict[str, dict[str, list[float]]]:
    """See Metrics; ``precision`` is (101, K) at IoU 0.5."""
    rates = _rates_by_class(scores, CONFIDENCES, len(classes))
    known = list(scores)
    curves = {"all": _by_confidence(rates[:, known].mean(axis=1) if known else rates[:, 0])}
    for class_id in known:
        curve = {"recall": np.linspace(0, 1, 101).tolist(), "precision": precision[:, class_id].tolist()}
        curves[classes[class_id]] = {**curve, **_by_confidence(rates[:, class_id])}
    return curves


def _by_confidence(rates: NDArray[np.float64]) -> dict[str, list[float]]:
    precision, recall, f1, kept = rates
    return {
        "confidence": CONFIDENCES.astype(np.float64).round(3).tolist(),
        "f1": f1.tolist(),
        "precision_at": np.where(kept > 0, precision, nan).tolist(),
        "recall_at": recall.tolist(),
    }


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


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of those that are not NaN, NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else nan


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and isnan(value) else value for key, value in values.items()}
