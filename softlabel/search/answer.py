"""What the search found, and how sure that is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabel.config import Dimension, Search
from softlabel.errors import NO_LABELS
from softlabel.search.curve import Curve
from softlabel.search.plan import curve_of
from softlabel.search.space import THRESHOLD, Values, distinct, grid, to_unit
from softlabel.search.trials import Trial, evidence

CONFIDENCE = 0.9
_SAMPLES = 4000
_LINE_POINTS = 91
# Searches of steep curves that saw little of their ends came to just above 0.5, those of flat ones to at least 0.62.
_FLAT = 0.6


def answer(search: Search, trials: Sequence[Trial], references: Sequence[Values]) -> dict[str, Any]:
    """The best of the values whose students trained to the end, and what is known about it.

    Returns:
        ``values``; ``map50`` (what a student of these values is expected to reach on the validation split, with a 90 %
        interval of that mean) and ``students`` (how many were trained in full); ``noise`` (standard deviation between
        seeds); ``compared`` (how many values have students that got far enough to compare them); ``flat_probability``
        (that mAP depends on nothing that was varied; 0.5 when one value alone was tried) and ``flat`` (whether that is
        above 0.6); ``lines``: per varied key, values along a line through the best, up to where no label is left, with
        mean, low, high and, for ranges only, the 90 % interval of the peak's position; ``against``: per other reference
        at which a label is left, the probability that the best beats it, the gain and its 90 % interval.

    Raises:
        ValueError: No student trained to the end.
    """
    complete = [trial.values for trial in trials if trial.is_full]
    points = distinct(complete)
    if not points:
        raise ValueError("no student trained to the end")
    curve = curve_of(search, trials)
    compared = len(distinct([one.values for one in evidence(trials)]))
    means, _ = curve.mean_and_sd(to_unit(search.space, points))
    best = points[int(np.argmax(means))]
    rng = np.random.default_rng(0)
    return {
        "values": best,
        "map50": _spread(curve.sample(to_unit(search.space, [best]), _SAMPLES, rng)[:, 0]),
        "students": complete.count(best),
        "noise": curve.noise,
        "flat_probability": curve.flat_probability,
        "compared": compared,
        "flat": bool(curve.flat_probability > _FLAT),
        "lines": {key: _line(search, curve, best, key, trials, rng) for key in search.space},
        "against": [
            _against(search, curve, best, values, complete, rng)
            for values in references
            if values != best and values.get(THRESHOLD, 0.0) < _no_labels_from(trials)
        ],
    }


def _line(
    search: Search, curve: Curve, best: Values, key: str, trials: Sequence[Trial], rng: np.random.Generator
) -> dict[str, Any]:
    axis = [value for value in _axis(key, search.space[key]) if key != THRESHOLD or value < _no_labels_from(trials)]
    x = to_unit(search.space, [{**best, key: value} for value in axis])
    means, _ = curve.mean_and_sd(x)
    line: dict[str, Any] = {"at": axis, "mean": means.tolist()}
    samples = curve.sample(x, _SAMPLES, rng)
    line["low"], line["high"] = np.percentile(samples, _percentiles(), axis=0).tolist()
    if search.space[key].choices is None:
        peaks = np.array(axis)[_peaks(samples, rng)]
        line["peak_low"], line["peak_high"] = (float(value) for value in np.percentile(peaks, _percentiles()))
    return line


def _axis(key: str, dimension: Dimension) -> list[Any]:
    return [next(iter(point.values())) for point in grid({key: dimension}, _LINE_POINTS)]


def _no_labels_from(trials: Sequence[Trial]) -> float:
    """The lowest threshold at which all tiles together had nothing to train on: nor have they above it."""
    failed = [trial for trial in trials if trial.status == "failed" and trial.subset == 1]
    without = [trial.values for trial in failed if trial.reason.startswith(NO_LABELS)]
    return min((values[THRESHOLD] for values in without if THRESHOLD in values), default=np.inf)


def _peaks(samples: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """(S,) where each curve is highest; one that is level may have its peak anywhere."""
    level = samples.max(axis=1) - samples.min(axis=1) < 1e-9
    return np.where(level, rng.integers(0, samples.shape[1], len(samples)), samples.argmax(axis=1))


def _against(
    search: Search, curve: Curve, best: Values, reference: Values, complete: list[Values], rng: np.random.Generator
) -> dict[str, Any]:
    samples = curve.sample(to_unit(search.space, [best, reference]), _SAMPLES, rng)
    gains = samples[:, 0] - samples[:, 1]
    return {
        "values": reference,
        "students": complete.count(reference),
        "probability": float((gains > 1e-9).mean()),
        "gain": _spread(gains),
    }


def _spread(samples: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.percentile(samples, _percentiles())
    return {"mean": float(samples.mean()), "low": float(low), "high": float(high)}


def _percentiles() -> tuple[float, float]:
    return 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)
