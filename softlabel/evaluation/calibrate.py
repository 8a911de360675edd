"""Calibrate scores on labelled tiles, and measure on tiles left out of the fit how far off they are.

Isotonic regression (Zadrozny and Elkan, KDD 2002) or a temperature (Guo et al., arXiv:1706.04599), per class, of "is a
true positive at IoU 0.5" on the score of the best class. The expected calibration error is Guo's, over 15 bins.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize_scalar

from softlabel.calibration import Calibration, Mapping
from softlabel.evaluation.matching import TileResult, match, to_columns

Method = Literal["isotonic", "temperature"]

_BINS = 15
_FOLDS = 5
LEAST = 10
"""With fewer right boxes than this, or fewer wrong ones, nothing is fitted."""


def calibrate(
    tiles: Sequence[TileResult], classes: tuple[str, ...], groups: Sequence[str], method: Method
) -> tuple[Calibration, list[dict[str, Any]]]:
    """Fit to all tiles; for the errors, also to four fifths of the groups at a time, judged on the fifth left out.

    Args:
        tiles: Labels as ``detections``, not filtered by a threshold.
        classes: Names; class ids index them.
        groups: One per tile; a group is fitted or judged as a whole.
        method: What is fitted.

    Returns:
        The calibration, and per class (then ``all``) a row: class, boxes, right, ece and ece_calibrated on tiles left
        out (None without a box); for classes also threshold and mapped (False where too few boxes are right or wrong).

    Raises:
        ValueError: As for metrics.evaluate.
    """
    columns = to_columns(tiles, len(classes))
    (matches,) = match(columns, [0.5])
    right, counted = matches.found, matches.counted
    fold_of_group = {group: i % _FOLDS for i, group in enumerate(sorted(set(groups)))}
    folds = np.array([fold_of_group[group] for group in groups], np.int64)[columns.tile]
    truth = columns.truth_counts()
    mappings, thresholds, rows = [], [], []
    held_out = np.zeros(len(right), np.float32)
    for k, name in enumerate(classes):
        of_class = counted & (columns.class_ids == k)
        scores, good = columns.scores[of_class], right[of_class]
        mapping = _fit(scores, good, method)
        held_out[of_class] = _held_out(scores, good, folds[of_class], method)
        mappings.append(mapping)
        thresholds.append(_best_threshold(mapping(scores), good, int(truth[k])))
        rows.append(
            _row(name, scores, held_out[of_class], good) | {"threshold": thresholds[-1], "mapped": mapping != _AS_IS}
        )
    rows.append(_row("all", columns.scores[counted], held_out[counted], right[counted]))
    return Calibration(classes, tuple(mappings), tuple(thresholds)), rows


_AS_IS = Mapping(temperature=1.0)


def expected_calibration_error(scores: NDArray[np.float32], right: NDArray[np.bool_]) -> float | None:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by their boxes; None without any."""
    if not len(scores):
        return None
    bins = np.minimum((scores * _BINS).astype(np.int64), _BINS - 1)
    confidence = np.bincount(bins, scores, _BINS)
    accuracy = np.bincount(bins, right, _BINS)
    return float(np.abs(confidence - accuracy).sum() / len(scores))


def _fit(scores: NDArray[np.float32], right: NDArray[np.bool_], method: Method) -> Mapping:
    if min(right.sum(), (~right).sum()) < LEAST:
        return _AS_IS
    return isotonic(scores, right) if method == "isotonic" else _temperature(scores, right)


def isotonic(scores: NDArray[np.float32], right: NDArray[np.bool_]) -> Mapping:
    """Isotonic regression, as knots at the two ends of every level."""
    order = np.argsort(scores, kind="stable")
    at, start = np.unique(scores[order].astype(np.float64), return_index=True)
    sizes = np.diff(np.append(start, len(scores)))
    shares = np.add.reduceat(right[order].astype(np.float64), start) / sizes
    levels = isotonic_regression(shares, weights=sizes).x
    ends = np.flatnonzero(np.diff(levels)) + 1
    knots = np.unique(np.concatenate([[0, len(at) - 1], ends, ends - 1]))
    return Mapping(None, tuple(at[knots].tolist()), tuple(levels[knots].tolist()))


def _temperature(scores: NDArray[np.float32], right: NDArray[np.bool_]) -> Mapping:
    def loss(log_temperature: float) -> float:
        chances = np.clip(Mapping(float(np.exp(log_temperature)))(scores).astype(np.float64), 1e-7, 1 - 1e-7)
        return float(-np.where(right, np.log(chances), np.log1p(-chances)).mean())

    return Mapping(float(np.exp(minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded").x)))


def _held_out(
    scores: NDArray[np.float32], right: NDArray[np.bool_], folds: NDArray[np.int64], method: Method
) -> NDArray[np.float32]:
    """The score of each box by a mapping that was fitted without its fold."""
    mapped = scores.copy()
    for fold in range(_FOLDS):
        out = folds == fold
        if out.any():
            mapped[out] = _fit(scores[~out], right[~out], method)(scores[out])
    return mapped


def _best_threshold(chances: NDArray[np.float32], right: NDArray[np.bool_], truth: int) -> float:
    """Where a class's F1 is highest: just below the lowest score kept; 0 where nothing is right."""
    if not right.any():
        return 0.0
    order = np.argsort(-chances, kind="stable")
    found = np.cumsum(right[order])
    f1 = 2 * found / (np.arange(1, len(found) + 1) + truth)
    last_of_tie = np.append(chances[order][1:] != chances[order][:-1], True)
    best = int(np.argmax(np.where(last_of_tie, f1, -1.0)))
    return max(0.0, float(np.nextafter(chances[order][best], np.float32(0))))


def _row(
    name: str, scores: NDArray[np.float32], mapped: NDArray[np.float32], right: NDArray[np.bool_]
) -> dict[str, Any]:
    return {
        "class": name,
        "boxes": len(scores),
        "right": int(right.sum()),
        "ece": expected_calibration_error(scores, right),
        "ece_calibrated": expected_calibration_error(mapped, right),
    }
