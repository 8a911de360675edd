"""What a model learns from: tiles with boxes, from truth or from soft labels above a threshold."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.boxes import iou_matrix
from softlabel.calibration import Calibration
from softlabel.config import HARD, Soft, Threshold
from softlabel.detectors.class_map import ClassMap
from softlabel.errors import NO_LABELS, TrainingError
from softlabel.records import EMPTY, LABELLED, PAD_VALUE, UNKNOWN_CLASS, Detections, Nms, Truth, detections_from_row
from softlabel.shards import read_shards, read_soft_labels
from softlabel.store import digest, file_digest
from softlabel.tile_table import read_tiles
from softlabel.training.soft import SAME_OBJECT_IOU, Softness, label_softness, truth_softness, with_parts

WEIGHTS = "weights.safetensors"
"""What a finished training step leaves in its folder, beside done.json."""
STATE = "state.pt"
"""What an unfinished one has there: all that is needed to go on after its last epoch."""


@dataclass(frozen=True)
class Target:
    """One training tile: its row (where its pixels are), boxes (N, 4) float32 xyxy tile pixels, class_ids (N,).

    ``unknown`` (H, 4) are boxes of objects whose class nobody knows. ``xywhr`` (N, 5) are rotated boxes, of which
    ``boxes`` are the hulls; None where boxes are upright. ``soft`` is what the boxes are worth, None where all are
    worth the same and the rest is background.
    """

    tile: dict
    boxes: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    unknown: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    xywhr: NDArray[np.float32] | None = None
    soft: Softness | None = None
    supplements: bool = False

    def hide_unknown(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The tile's pixels (rows, columns, bands), with unknown objects covered by the grey of the padding.

        Such an object is then neither one to find nor background in any model's loss, as VisDrone's ignored regions are
        usually treated. Pixels that it shares with a known box stay.
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
    """One model to train. It names the splits it may see, and no other is ever read.

    ``class_map`` says to which of the recipe's classes each of ``classes`` belongs, where these are finer; None: they
    are the recipe's. Truth, thresholds and validation only know the recipe's.
    """

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
    soft: Soft = HARD
    drop: float = 0.0
    class_map: ClassMap | None = None

    def identity(self) -> dict:
        """All that determines the model; the name of its folder follows from it."""
        return {
            "nms": asdict(self.nms),  # affects validation mAP, and so which epoch is kept
            "model": self.model,
            "weights": file_digest(self.weights) if self.weights else None,
            "args": self.args,
            "tiles": self.tiles.name,
            "split": self.split,
            "val_split": self.val_split,
            "soft_labels": self.soft_labels.name if self.soft_labels else None,
            "threshold": self.threshold,
            **({} if self.subset == 1 else {"subset": self.subset}),
            **({"calibration": digest(self.calibration.to_json())} if self.calibration else {}),
            **({} if self.soft == HARD else {"soft": self.soft.model_dump(mode="json", exclude_defaults=True)}),
            **({"drop": self.drop} if self.drop else {}),
            "seed": self.seed,
        }

    def targets(self) -> list[Target]:
        """The training set.

        Raises:
            TrainingError: It has no box, or all weigh nothing, or none is rotated and the model finds rotated ones, or
                ``soft.localisation_power`` is set and no box has an agreement.
        """
        from softlabel.detectors.weights import finds_rotated  # imports PyTorch and ultralytics

        if self.soft_labels is None:
            targets = truth_targets(self.tiles, self.split, self.soft, len(self.classes))
        else:
            soften, threshold = None if self.soft == HARD else self._soften, self._per_class(self.threshold or 0.0)
            targets = soft_targets(
                self.tiles, self.split, self.soft_labels, threshold, self.calibration, soften, self.drop
            )
            if self.soft.localisation_power:
                _check_agreement(self.soft_labels, self.tiles, self.split)
            if soften and not any(target.soft.weights.any() for target in targets if target.soft):
                raise TrainingError(f"{self.name}: every label weighs 0: lower train.soft.weight_power")
            if self.soft.soft_teacher:
                targets = [_with_parts(target) for target in targets]
            targets += self._supplement()
        if finds_rotated(self.model) and all(target.xywhr is None for target in targets):
            raise TrainingError(
                f"{self.name}: {self.model} learns rotated boxes, and those of {self.soft_labels or self.tiles} are "
                "upright: train a model such as yolo11n.yaml, or give truth in DOTA format or labels of an -obb model"
            )
        return _checked(_subset(targets, self.subset), f"the {self.subset:g} of {self.split} that is used has no box")

    def _supplement(self) -> list[Target]:
        """Tiles with truth that are learned beside the soft labels."""
        supplement = self.soft.supplement
        if supplement is None:
            return []
        targets = truth_targets(self.tiles, supplement.of(self.split), self.soft, len(self.classes))
        return [
            replace(
                target, supplements=True, soft=replace(target.soft, weights=target.soft.weights * supplement.weight)
            )
            for target in targets
            if target.soft
        ]

    def _soften(self, found: Detections, kept: NDArray[np.bool_]) -> Softness:
        low = self.soft.ignore_above
        unsure = np.zeros(len(found.boxes), bool) if low is None else found.is_above(self._per_class(low))
        calibrated = self.calibration is not None
        return label_softness(found, kept, unsure, len(self.classes), self.soft, calibrated=calibrated)

    def _per_class(self, threshold: Threshold) -> float | NDArray[np.float32]:
        if isinstance(threshold, dict):
            parents = dict(self.class_map.becomes) if self.class_map else {}
            return np.array([threshold[parents.get(name) or name] for name in self.classes], np.float32)
        return threshold


def _with_parts(target: Target) -> Target:
    width, height = target.tile["window"][2:]
    return replace(target, soft=with_parts(target.soft, width, height)) if target.soft else target


def truth_targets(tiles: Path, split: str, soft: Soft = HARD, num_classes: int = 0) -> list[Target]:
    """The tiles of a split with the boxes people drew, but without those boxes that evaluation ignores.

    Args:
        tiles: The folder of the tiling step.
        split: Which of its splits.
        soft: What the boxes are worth.
        num_classes: K, where ``soft`` is given.

    Raises:
        TrainingError: The split's truth has no box.
    """
    targets = []
    for row in read_tiles(tiles, [split]):
        if row["truth"] is not None:
            truth = Truth.from_row(row["truth"])
            known, unknown = truth.at(~truth.ignore), truth.boxes[truth.class_ids == UNKNOWN_CLASS]
            if soft.ignore_truth:  # they are regions of their own: no pixel need be hidden
                unknown = unknown[:0]
            softness = None if soft == HARD else truth_softness(row, truth, num_classes, soft)
            targets.append(Target(row, known.boxes, known.class_ids.astype(np.int64), unknown, known.xywhr, softness))
    return _checked(targets, f"split {split} of {tiles} has no truth with a box that counts")


def soft_targets(
    tiles: Path,
    split: str,
    store: Path,
    threshold: float | NDArray[np.float32],
    calibration: Calibration | None = None,
    soften: Callable[[Detections, NDArray[np.bool_]], Softness] | None = None,
    drop: float = 0.0,
) -> list[Target]:
    """The tiles of a split with those of a teacher's boxes whose best score, as ``calibration`` maps it, is strictly
    above ``threshold``, or above that of its class. ``soften`` is given all boxes and which of them are above, and says
    what they are worth. A share of the objects is removed first (``drop``), each with all its labels, as if nothing had
    been found there.

    A tile that was rejected in labelling, or that is empty, is left out: it is no example of background.

    Raises:
        TrainingError: No tile was labelled, or no box is above the threshold.
    """
    rows = {row["tile_id"]: row for row in read_tiles(tiles, [split])}
    targets = []
    for label in read_soft_labels(store):
        if label["tile_id"] in rows and label["status"] == LABELLED:
            found = detections_from_row(label)
            if calibration:
                found = calibration.apply(found)
            if drop:
                found = _without_some(found, drop, label["tile_id"])
            is_kept = found.is_above(threshold)
            softness = soften(found, is_kept) if soften else None
            kept = found.at(is_kept)
            targets.append(Target(rows[label["tile_id"]], kept.boxes, kept.class_ids, xywhr=kept.xywhr, soft=softness))
    return _checked(targets, f"no soft label of {store} is above {threshold}")


def _check_agreement(store: Path, tiles: Path, split: str) -> None:
    asked = {row["tile_id"] for row in read_tiles(tiles, [split], ["tile_id", "split"])}
    for row in read_soft_labels(store):
        if row["tile_id"] in asked and row["boxes"] and row.get("agreement") is not None:
            return
    raise TrainingError(
        f"train.soft.localisation_power cannot be used, since no box of {store} has an agreement: delete that folder "
        "and label again if an older softlabel made it, else remove the key (fused or augmented labels and those of "
        "teachers without NMS have none)"
    )


def _without_some(found: Detections, share: float, tile_id: str) -> Detections:
    """A tile's labels without those of a share of its objects; an object is a label that overlaps no better one.

    Which ones go depends only on tile and labels, not on the threshold, so that all students lack the same ones.
    """
    overlaps = iou_matrix(found.boxes, found.boxes) > SAME_OBJECT_IOU
    is_object = ~np.tril(overlaps, -1).any(axis=1)  # labels come best first
    draws = np.random.default_rng(int(digest(tile_id), 16)).random(len(found.boxes))
    gone = overlaps[:, is_object & (draws < share)].any(axis=1)
    return found.at(np.flatnonzero(~gone))


def num_empty(store: Path, tiles: Path, split: str) -> int:
    """Tiles of a split in which labelling found no valid pixel: `soft_targets` leaves them out."""
    asked = {row["tile_id"] for row in read_tiles(tiles, [split], ["tile_id", "split"])}
    found = (table.filter(pc.equal(table["status"], EMPTY)) for table in read_shards(store, ["tile_id", "status"]))
    return sum(tile_id in asked for table in found for tile_id in table["tile_id"].to_pylist())


def _subset(targets: list[Target], share: float) -> list[Target]:
    """A share of the tiles, in their order: those whose ids hash lowest, so that larger shares include smaller ones."""
    if share >= 1:
        return targets
    order = sorted(range(len(targets)), key=lambda i: digest(targets[i].tile["tile_id"]))
    return [targets[i] for i in sorted(order[: math.ceil(share * len(targets))])]


def _checked(targets: list[Target], problem: str) -> list[Target]:
    if not any(len(target.boxes) for target in targets):
        raise TrainingError(f"{NO_LABELS}: {problem}")
    return targets
