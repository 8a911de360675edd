"""The one metric implementation: detections against truth, by COCO's rules (hotcoco, equal to pycocotools).

Every table, early stopping and the best epoch read these numbers. One matching serves them all
(matching.py). How good labels are and whether two results differ is in quality.py.

Shape suffixes: N detections, K classes, C confidences.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from typing import Any

import numpy as np
from hotcoco import COCOeval
from numpy.typing import NDArray

from softlabel.evaluation.matching import Columns, Matches, TileResult, evaluator_of, match_at, to_columns

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
CONFIDENCES = np.linspace(0, 1, 1001, dtype=np.float32)
"""The grid on which curves are drawn. The best F1 is sought among all scores, not on the grid."""


@dataclass(frozen=True)
class Metrics:
    """How well detections fit truth, all in [0, 1]; NaN where there is no truth to judge by.

    Attributes:
        map50: COCO's 101-point AP at IoU 0.5, mean over the classes that have truth.
        map50_95: The same, averaged over IoU 0.5, 0.55, ... 0.95.
        precision: Mean over the same classes at IoU 0.5, of detections scored strictly above ``f1_conf``.
        recall: Likewise.
        f1: Likewise, the highest that any confidence reaches: the mean of the classes' F1, not the F1 of the means.
        f1_conf: Where it is reached, a float32 just below the lowest score kept; 0 where nothing matches.
        per_class: By class name, in the order of the classes: ap50, ap50_95, precision, recall, f1 (all NaN without
            truth; a class that has truth and no detection kept has precision 0), truth and detections (counts).
        rotated: Whether IoU is that of rotated boxes (softlabel.evaluation.matching).
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
    rotated: bool
    curves: dict[str, dict[str, list[float]]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the curves, JSON-able: NaN is None."""
        values = asdict(self)
        del values["curves"]
        per_class = {name: _without_nan(row) for name, row in values.pop("per_class").items()}
        return {**_without_nan(values), "per_class": per_class}


@dataclass(frozen=True)
class _ClassScores:
    """One class at IoU 0.5: the scores of its counted detections and of the true positives, ascending."""

    counted: NDArray[np.float32]
    found: NDArray[np.float32]
    truth: int

    def rates(self, confidences_C: NDArray[np.float32]) -> NDArray[np.float64]:
        """(4, C) of detections strictly above each confidence: precision (0 if none), recall, F1, how many."""
        kept = len(self.counted) - np.searchsorted(self.counted, confidences_C, side="right")
        found = len(self.found) - np.searchsorted(self.found, confidences_C, side="right")
        return np.stack([found / np.maximum(kept, 1), found / self.truth, 2 * found / (kept + self.truth), kept])


def evaluate(tiles: Sequence[TileResult], classes: tuple[str, ...]) -> Metrics:
    """Judge detections against truth. No tiles, no truth or no detections is no error: see Metrics.

    Args:
        tiles: In any order (it decides only between equal scores).
        classes: Names; class ids index them.

    Raises:
        ValueError: A class vector's length or a class id does not fit ``classes``.
    """
    columns = to_columns(tiles, len(classes))
    evaluator = evaluator_of(columns)
    precision = _interpolated_precision(evaluator, columns)
    ap50, ap50_95 = precision[0].mean(axis=0), precision.mean(axis=(0, 1))
    scores = _scores_by_class(columns, match_at(evaluator, 0.5, len(columns.tile)))
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
        rotated=columns.rotated,
        curves=_curves(classes, scores, precision[0]),
    )


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
    """The lowest confidence where the macro F1 is highest. Exact, as admitting only false positives lowers it."""
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


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of those that are not NaN, NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else nan


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and isnan(value) else value for key, value in values.items()}
