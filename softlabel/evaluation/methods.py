"""Several ways to train students, judged together: how good, how far above the plain one, how much of the gap to truth.

The bootstrap draws groups of test images and, for each method, the seeds of its students; both draws are the same for
all methods, which learn with the same seeds. Four seeds are few: the spread among their resamples is sqrt(3/4) of that
among seeds, and intervals are too narrow by that factor where seeds, not images, make them wide.

Shape suffixes: S resamples (the first is the data as they are), R seeds, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabel.evaluation.matching import TileResult, to_columns
from softlabel.evaluation.quality import class_mean, draw_weights, or_none, percentiles, resampled_ap

ALL_SETS = "all"
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Student:
    """One student's detections on the test tiles, which are the same for all."""

    method: str
    train_set: str
    seed: int
    results: Sequence[TileResult]


def method_rows(
    students: Sequence[Student],
    classes: tuple[str, ...],
    *,
    plain: str,
    truth: str,
    samples: int,
    seed: int,
    groups: Sequence[str],
) -> list[dict[str, Any]]:
    """What each method reaches on each training set, and on the mean of all, compared with ``plain`` and ``truth``.

    Args:
        students: One or several for each method and training set, with the same seeds.
        classes: Names; class ids index them.
        plain: The method that gains are measured against.
        truth: The method that closes all of the gap: training on truth.
        samples: Resamples; 0 leaves the intervals None.
        seed: Of the draws.
        groups: One per tile; a group is drawn as a whole.

    Returns:
        Per method and training set (then ``all``, if there are several): method, train_set, students, map50 and
        map50_95, gain and gain_50_95 (over plain), gap_closed (share of truth minus plain, in mAP50; all of these with
        value, low, high, and gains with distinguishable), seeds (mAP50 of each, by seed; none for ``all``), per_class
        (AP50, mean over seeds).

    Raises:
        ValueError: ``plain`` or ``truth`` has no student on a training set.
    """
    weights_ST = draw_weights(groups, len(students[0].results), samples, seed)
    by_method: dict[tuple[str, str], list[Student]] = {}
    for student in sorted(students, key=lambda one: one.seed):
        by_method.setdefault((student.method, student.train_set), []).append(student)
    sets = list(dict.fromkeys(student.train_set for student in students))
    names = list(dict.fromkeys(student.method for student in students))
    for name in (plain, truth):
        if missing := [one for one in sets if (name, one) not in by_method]:
            raise ValueError(f"no student of {name} on {', '.join(missing)}")
    found = {key: _of_method(some, classes, weights_ST, seed) for key, some in by_method.items()}
    if len(sets) > 1:
        for name in names:
            parts = [found[name, one] for one in sets if (name, one) in found]
            if len(parts) == len(sets):
                found[name, ALL_SETS] = _mean(parts)
    rows = []
    for name in names:
        for train_set in [*sets, ALL_SETS]:
            if (name, train_set) in found:
                own = found[name, train_set]
                rows.append(_row(own, found[plain, train_set], found[truth, train_set], name, train_set, classes))
    return rows


@dataclass(frozen=True)
class _Found:
    """(S,) mAP50 and mAP50-95, AP50 of each class (K,), mAP50 by seed."""

    map50: NDArray[np.float64]
    map50_95: NDArray[np.float64]
    per_class: NDArray[np.float64]
    seeds: dict[str, float]
    count: int


def _of_method(
    students: Sequence[Student], classes: tuple[str, ...], weights_ST: NDArray[np.int32], seed: int
) -> _Found:
    aps = [resampled_ap(to_columns(student.results, len(classes)), weights_ST) for student in students]
    map50_RS = np.stack([class_mean(ap[..., 0]) for ap in aps])
    map50_95_RS = np.stack([class_mean(ap.mean(axis=2)) for ap in aps])
    count, samples = len(students), len(weights_ST)
    # How often each seed counts; the same for methods with equally many.
    draws = np.random.default_rng([seed, count]).multinomial(count, np.full(count, 1 / count), size=samples)
    draws[0] = 1
    return _Found(
        (map50_RS * draws.T).sum(axis=0) / count,
        (map50_95_RS * draws.T).sum(axis=0) / count,
        np.mean([ap[0, :, 0] for ap in aps], axis=0),
        {str(student.seed): float(one[0]) for student, one in zip(students, map50_RS, strict=True)},
        count,
    )


def _mean(parts: Sequence[_Found]) -> _Found:
    return _Found(
        np.mean([part.map50 for part in parts], axis=0),
        np.mean([part.map50_95 for part in parts], axis=0),
        np.mean([part.per_class for part in parts], axis=0),
        {},
        sum(part.count for part in parts),
    )


def _row(
    own: _Found, plain: _Found, truth: _Found, method: str, train_set: str, classes: tuple[str, ...]
) -> dict[str, Any]:
    gap = truth.map50 - plain.map50
    share = np.where(gap > 0, (own.map50 - plain.map50) / np.where(gap > 0, gap, 1), np.nan)
    return {
        "method": method,
        "train_set": train_set,
        "students": own.count,
        "map50": _interval(own.map50),
        "map50_95": _interval(own.map50_95),
        "gain": _gain(own.map50 - plain.map50),
        "gain_50_95": _gain(own.map50_95 - plain.map50_95),
        "gap_closed": _interval(share),
        "seeds": own.seeds,
        "per_class": {name: or_none(value) for name, value in zip(classes, own.per_class.tolist(), strict=True)},
    }


def _interval(values_S: NDArray[np.float64]) -> dict[str, float | None]:
    low, high = percentiles(values_S[1:], _CONFIDENCE)
    return {"value": or_none(values_S[0]), "low": low, "high": high}


def _gain(values_S: NDArray[np.float64]) -> dict[str, float | bool | None]:
    found = _interval(values_S)
    low, high = found["low"], found["high"]
    return {**found, "distinguishable": low is not None and high is not None and (low > 0 or high < 0)}
