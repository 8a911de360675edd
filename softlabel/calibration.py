"""Calibration of a teacher: per class, a monotonic mapping from score to the share of boxes with it that are right.

Stored labels keep their raw scores; a mapping is applied when a training set is made.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabel.config import Recipe
from softlabel.errors import StoreError
from softlabel.records import Detections
from softlabel.storage import location

_EDGE = 1e-7  # a score of 0 or 1 has no logit


@dataclass(frozen=True)
class Mapping:
    """The mapping of one class: a temperature, sigmoid(logit(score) / temperature), or knots to interpolate between."""

    temperature: float | None = None
    scores: tuple[float, ...] = ()
    chances: tuple[float, ...] = ()

    def __call__(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map scores of any shape; values are in [0, 1]."""
        if self.temperature is None:
            return np.interp(scores, self.scores, self.chances).astype(np.float32)
        clipped = np.clip(scores.astype(np.float64), _EDGE, 1 - _EDGE)
        logits = np.log(clipped) - np.log1p(-clipped)
        return (1 / (1 + np.exp(-logits / self.temperature))).astype(np.float32)


@dataclass(frozen=True)
class Calibration:
    """For each class a mapping, and the mapped score above which its boxes have the best F1."""

    classes: tuple[str, ...]
    mappings: tuple[Mapping, ...]
    thresholds: tuple[float, ...]

    def apply(self, found: Detections) -> Detections:
        """Detections with mapped class vectors, best first; the best class of a box may change."""
        if not len(found.scores):
            return found
        columns = [mapping(found.scores[:, k]) for k, mapping in enumerate(self.mappings)]
        scores = np.stack(columns, axis=1)
        order = np.argsort(-scores.max(axis=1), kind="stable")
        return replace(found, scores=scores).at(order)

    def to_json(self) -> str:
        """As ``read_calibration`` reads it."""
        return json.dumps(asdict(self), indent=1)


def calibration_of(recipe: Recipe) -> Calibration | None:
    """The calibration that ``train.calibration`` names, if any.

    Raises:
        StoreError: As ``read_calibration``.
    """
    wanted = recipe.train.calibration
    return read_calibration(location(wanted), recipe.classes) if wanted else None


def read_calibration(path: Path, classes: tuple[str, ...]) -> Calibration:
    """Read a calibration file, which must be for ``classes``.

    Raises:
        StoreError: It is missing, is no calibration, or is for other classes.
    """
    try:
        data = json.loads(path.read_text())
        mappings = tuple(
            Mapping(one["temperature"], tuple(one["scores"]), tuple(one["chances"])) for one in data["mappings"]
        )
        found = Calibration(tuple(data["classes"]), mappings, tuple(data["thresholds"]))
    except FileNotFoundError:
        raise StoreError(f"no calibration at {path}: make one with `softlabel calibrate`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is no calibration ({type(error).__name__}): make it anew") from None
    if found.classes != classes:
        raise StoreError(
            f"{path} is for the classes {', '.join(found.classes)}, the recipe has {', '.join(classes)}: make it anew"
        )
    return found
