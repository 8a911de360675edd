"""Thresholds that need no student: where labels are right often enough, and where their scores split into two modes.

A label is kept if its score is strictly above the threshold. All of these are what `softlabel search` tries first.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.mixture import GaussianMixture

from softlabel.config import Threshold
from softlabel.evaluation.calibrate import LEAST, isotonic
from softlabel.evaluation.matching import TileResult, match, to_columns

_MOST_SCORES = 100_000


def at_precision(
    tiles: Sequence[TileResult], classes: tuple[str, ...], precision: float, *, per_class: bool
) -> Threshold | None:
    """The threshold above which labels are right with a probability of ``precision`` or more, by isotonic regression of
    "is a true positive at IoU 0.5" on their score (softlabel.evaluation.calibrate).

    Args:
        tiles: Labels as ``detections``, with truth.
        classes: Names; class ids index them.
        precision: In (0, 1).
        per_class: Whether to give one for each class. A class with fewer than 10 right or fewer than 10 wrong labels,
            or that is never right so often, gets the one of all labels.

    Returns:
        None where all labels together are too few, or do not reach ``precision`` either.

    Raises:
        ValueError: As for metrics.evaluate.
    """
    columns = to_columns(tiles, len(classes))
    (matches,) = match(columns, [0.5])

    def of(chosen: NDArray[np.bool_]) -> float | None:
        scores, right = columns.scores[chosen & matches.counted], matches.found[chosen & matches.counted]
        if min(right.sum(), (~right).sum()) < LEAST:
            return None
        fitted = isotonic(scores, right)
        enough = np.flatnonzero(np.array(fitted.chances) >= precision)
        return _below(fitted.scores[enough[0]]) if len(enough) else None

    found = {name: of(columns.class_ids == k) for k, name in enumerate(classes)} if per_class else {}
    return _filled(of(np.ones(len(columns.scores), bool)), found)


def of_mixture(
    scores: NDArray[np.float32], class_ids: NDArray[np.int64], classes: tuple[str, ...], *, per_class: bool
) -> Threshold | None:
    """The threshold above which a score is likelier from the upper of two Gaussians, fitted as a mixture to all scores.

    As in Consistent-Teacher (Wang et al., arXiv:2209.01589): one Gaussian is for labels of objects, the other for false
    ones. Theirs is refitted during training, to a class's best predictions; ours once, to all stored labels.

    Args:
        scores: (N,) best scores.
        class_ids: (N,) their classes.
        classes: Names.
        per_class: Whether to give one for each class; a class with fewer than 20 labels, or whose scores are all the
            same, gets the one of all labels.

    Returns:
        None where all labels together are too few, or their scores all the same.
    """
    found = {name: _between(scores[class_ids == k]) for k, name in enumerate(classes)} if per_class else {}
    return _filled(_between(scores), found)


def _between(scores: NDArray[np.float32]) -> float | None:
    if len(scores) < 2 * LEAST or scores.min() == scores.max():
        return None
    ordered = np.sort(scores)[:: len(scores) // _MOST_SCORES + 1, None].astype(np.float64)
    fitted = GaussianMixture(2, tol=1e-6, max_iter=1000, means_init=[ordered[0], ordered[-1]], random_state=0).fit(
        ordered
    )
    low, high = fitted.means_.argmin(), fitted.means_.argmax()
    is_upper = (fitted.predict(ordered) == high) & (ordered[:, 0] > fitted.means_[low, 0])
    return _below(float(ordered[is_upper.argmax(), 0])) if is_upper.any() else None


def _filled(of_all: float | None, per_class: dict[str, float | None]) -> Threshold | None:
    if not per_class or of_all is None:
        return of_all
    return {name: of_all if one is None else one for name, one in per_class.items()}


def _below(score: float) -> float:
    """The threshold just below a score, so that the score is above it."""
    return max(0.0, float(np.nextafter(np.float32(score), np.float32(0))))
