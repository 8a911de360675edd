"""What a model learns from: tiles with boxes, from truth or from soft labels above a threshold."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.calibration import Calibration
from softlabel.config import Threshold
from softlabel.errors import NO_LABELS, TrainingError
from softlabel.records import EMPTY, LABELLED, PAD_VALUE, UNKNOWN_CLASS, Nms, Truth, detections_from_row
from softlabel.store import digest, read_shards, read_soft_labels, read_tiles

WEIGHTS = "weights.safetensors"
"""What a finished training step leaves in its folder, beside done.json."""
STATE = "state.pt"
"""What it has there while it trains: all that is needed to go on after the last epoch."""


@dataclass(frozen=True)
class Target:
    """One training tile: its row (where its pixels are), boxes (N, 4) float32 xyxy tile pixels, class_ids (N,).

    ``unknown`` (H, 4) are boxes of objects whose class nobody knows. ``xywhr`` (N, 5) are rotated boxes, of which
    ``boxes`` are the hulls; None where boxes are upright.
    """

    tile: dict
    boxes: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    unknown: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    xywhr: NDArray[np.float32] | None = None

    def hide_unknown(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The tile's pixels (rows, columns, bands), those of unknown objects in the grey of the padding.

        So such an object is neither one to find nor background, in any model's loss; as VisDrone's ignored regions are
        usually treated. What it shares with a known box stays.
        """
        if not len(self.unknown):
            return image
        hidden = _inside(self.unknown, image.shape[:2]) & ~_inside(self.boxes, image.shape[:2])
        return np.where(hidden[..., None], np.uint8(PAD_VALUE), image)


def _inside(boxes_N4: NDArray[np.float32], size_hw: tuple[int, ...]) -> NDArray[np.bool_]:
    """(height, width): the pixels that any box touches."""
    inside = np.zeros(size_hw, bool)
    for x0, y0, x1, y1 in boxes_N4:
        inside[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)] = True
    return inside


@dataclass(frozen=True)
class TrainJob:
    """One model to train. It names the splits it may see, and no other is ever read."""

    name: str
    folder: Path
    classes: tuple[str, ...]
    model: str
    weights: Path | None
    args: dict[str, Any]
    tiles: Path
    split: str
    val_split: str
    soft_labels: Path | None
    threshold: Threshold | None
    calibration: Calibration | None
    subset: float
    seed: int
    nms: Nms

    def targets(self) -> list[Target]:
        """The training set.

        Raises:
            TrainingError: It has no box, or none is rotated and the model finds rotated ones.
        """
        from softlabel.detectors.weights import finds_rotated  # imports PyTorch and ultralytics

        if self.soft_labels is None:
            targets = truth_targets(self.tiles, self.split)
        else:
            targets = soft_targets(self.tiles, self.split, self.soft_labels, self._thresholds(), self.calibration)
        if finds_rotated(self.model) and all(target.xywhr is None for target in targets):
            raise TrainingError(
                f"{self.name}: {self.model} learns rotated boxes, and those of {self.soft_labels or self.tiles} are "
                "upright: train a model as yolo11n.yaml, or give truth in DOTA's form or labels of an -obb model"
            )
        return _checked(_subset(targets, self.subset), f"the {self.subset:g} of {self.split} that is used has no box")

    def _thresholds(self) -> float | NDArray[np.float32]:
        if isinstance(self.threshold, dict):
            return np.array([self.threshold[name] for name in self.classes], np.float32)
        return self.threshold or 0.0


def truth_targets(tiles: Path, split: str) -> list[Target]:
    """The tiles of a split with the boxes people drew; those that evaluation ignores are left out.

    Raises:
        TrainingError: The split has no tile with truth.
    """
    targets = []
    for row in read_tiles(tiles, [split]):
        if row["truth"] is not None:
            truth = Truth.from_row(row["truth"])
            known, unknown = truth.at(~truth.ignore), truth.boxes[truth.class_ids == UNKNOWN_CLASS]
            targets.append(Target(row, known.boxes, known.class_ids.astype(np.int64), unknown, known.xywhr))
    return _checked(targets, f"split {split} of {tiles} has no truth")


def soft_targets(
    tiles: Path,
    split: str,
    store: Path,
    threshold: float | NDArray[np.float32],
    calibration: Calibration | None = None,
) -> list[Target]:
    """The tiles of a split with a teacher's boxes whose best score, as ``calibration`` maps it, is strictly above
    ``threshold``, or its class's.

    A tile that was rejected in labelling, or that is empty, is left out: it is no example of background.

    Raises:
        TrainingError: No tile was labelled, or no box is above the threshold.
    """
    rows = {row["tile_id"]: row for row in read_tiles(tiles, [split])}
    targets = []
    for label in read_soft_labels(store):
        if label["tile_id"] in rows and label["status"] == LABELLED:
            found = detections_from_row(label)
            kept = (calibration.apply(found) if calibration else found).above(threshold)
            targets.append(Target(rows[label["tile_id"]], kept.boxes, kept.class_ids, xywhr=kept.xywhr))
    return _checked(targets, f"no soft label of {store} is above {threshold}")


def num_empty(store: Path, tiles: Path, split: str) -> int:
    """Tiles of a split in which labelling found no valid pixel: `soft_targets` leaves them out."""
    asked = {row["tile_id"] for row in read_tiles(tiles, [split], ["tile_id", "split"])}
    found = (table.filter(pc.equal(table["status"], EMPTY)) for table in read_shards(store, ["tile_id", "status"]))
    return sum(tile_id in asked for table in found for tile_id in table["tile_id"].to_pylist())


def _subset(targets: list[Target], share: float) -> list[Target]:
    """A share of the tiles, in their order: those whose ids hash lowest, so that a larger share holds a smaller one."""
    if share >= 1:
        return targets
    order = sorted(range(len(targets)), key=lambda i: digest(targets[i].tile["tile_id"]))
    return [targets[i] for i in sorted(order[: math.ceil(share * len(targets))])]


def _checked(targets: list[Target], problem: str) -> list[Target]:
    if not any(len(target.boxes) for target in targets):
        raise TrainingError(f"{NO_LABELS}: {problem}")
    return targets
