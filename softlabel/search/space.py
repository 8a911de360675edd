"""What the search may vary: recipe keys and their values, as Optuna, a grid and a Gaussian process see them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import distributions as optuna

from softlabel.config import Dimension, Recipe, Threshold

THRESHOLD = "train.threshold"
PAPER_THRESHOLDS = (0.3, 0.5)

Values = dict[str, Any]
"""Recipe key to value: one point of the space."""


def distributions(space: Mapping[str, Dimension]) -> dict[str, optuna.BaseDistribution]:
    """The space in Optuna's terms."""
    return {key: _distribution(key, dimension) for key, dimension in space.items()}


def _distribution(key: str, dimension: Dimension) -> optuna.BaseDistribution:
    if dimension.min is None or dimension.max is None:
        return optuna.CategoricalDistribution(dimension.choices or ())
    if _is_whole(key, dimension):
        return optuna.IntDistribution(int(dimension.min), int(dimension.max))
    return optuna.FloatDistribution(dimension.min, dimension.max)


def _is_whole(key: str, dimension: Dimension) -> bool:
    both = isinstance(dimension.min, int) and isinstance(dimension.max, int)
    return both and key.startswith(
        "train.student."
    )  # thresholds, weights and shares are real, however they are written


def grid(space: Mapping[str, Dimension], num_points: int) -> list[Values]:
    """Every combination of ``num_points`` equally spaced values of each range and of all choices."""
    axes = [_axis(key, dimension, num_points) for key, dimension in space.items()]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]


def _axis(key: str, dimension: Dimension, num_points: int) -> list[Any]:
    if dimension.min is None or dimension.max is None:
        return list(dimension.choices or ())
    points = np.linspace(dimension.min, dimension.max, num_points)
    if _is_whole(key, dimension):
        return sorted({round(point) for point in points})
    return [round(float(point), 6) for point in points]


def first_points(recipe: Recipe, automatic: Sequence[Threshold]) -> list[Values]:
    """What people would try: the paper's thresholds and those that follow from the labels.

    The other keys have the recipe's value or, where it has none or one outside the space, the middle of the key's range
    or choices. Thresholds outside the space are left out.
    """
    space = recipe.search.space
    keys = [key for key in space if key.startswith(THRESHOLD)]
    others = {key: value_of(recipe, key) for key in space if key not in keys}
    others = {
        key: value if contains({key: space[key]}, {key: value}) else _middle(key, space[key])
        for key, value in others.items()
    }
    asked = [*PAPER_THRESHOLDS, *automatic]
    points = [{**{key: _threshold_of(key, threshold) for key in keys}, **others} for threshold in asked]
    return distinct([point for point in points if keys and contains(space, point)])


def _threshold_of(key: str, threshold: Threshold) -> float:
    """The number that a key takes from a threshold, which is one for all classes or one for each."""
    value = threshold[key.removeprefix(f"{THRESHOLD}.")] if isinstance(threshold, dict) else threshold
    return round(value, 3)


def _middle(key: str, dimension: Dimension) -> Any:
    axis = _axis(key, dimension, 3)
    return axis[len(axis) // 2]


def value_of(recipe: Recipe, key: str) -> Any:
    """What the recipe has under a key; None if nothing."""
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else value
    return value


def contains(space: Mapping[str, Dimension], values: Values) -> bool:
    """Whether a point lies in the space."""
    for key, dimension in space.items():
        value = values[key]
        if dimension.min is None or dimension.max is None:
            if value not in (dimension.choices or ()):
                return False
        elif value is None or not dimension.min <= value <= dimension.max:
            return False
    return True


def distinct(points: Sequence[Values]) -> list[Values]:
    """Each point once, in the order of first appearance."""
    found: list[Values] = []
    for point in points:
        if point not in found:
            found.append(point)
    return found


def rounded(space: Mapping[str, Dimension], values: Values) -> Values:
    """A point rounded to a few thousand different values over each range, and still in the space."""
    return {key: _rounded(space[key], value) for key, value in values.items()}


def _rounded(dimension: Dimension, value: Any) -> Any:
    if dimension.min is None or dimension.max is None or not isinstance(value, float):
        return value
    digits = 3 - math.floor(math.log10(dimension.max - dimension.min))
    return min(max(round(value, digits), dimension.min), dimension.max)


def to_unit(space: Mapping[str, Dimension], points: list[Values]) -> NDArray[np.float64]:
    """(N, D) in 0..1: each range is scaled to it; each choice has a column, 0.5 where it is taken and 0 elsewhere
    (so that all choices are equally far from each other, and no farther than the ends of a range)."""
    columns: list[list[float]] = []
    for key, dimension in space.items():
        if dimension.min is None or dimension.max is None:
            columns += [[0.5 * (point[key] == choice) for point in points] for choice in dimension.choices or ()]
        else:
            width = dimension.max - dimension.min
            columns.append([(point[key] - dimension.min) / width for point in points])
    return np.array(columns, np.float64).T.reshape(len(points), -1)
