"""What `train.soft` makes of a tile's labels: class vectors, weights, and regions where background counts less.

softlabel.training.dataset carries these through augmentation, softlabel.detectors.soft_loss makes a loss of them.

Shape suffixes: N boxes, M regions, K classes.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from softlabel import rotated
from softlabel.boxes import iou_matrix
from softlabel.calibration import Mapping
from softlabel.config import Soft
from softlabel.records import Detections, Truth

SAME_OBJECT_IOU = 0.5
"""Labels that overlap more than this show the same object."""
_LEAST_DOUBT = 0.05  # labels with lower scores would change next to nothing, and there are very many
_PARTS = 4
"""A region that covers a whole tile is split into this many parts across and down: augmentation drops a box when a
tenth or less of it is left in the image, and would drop the whole tile as one box with much of it still in view."""


@dataclass(frozen=True)
class Softness:
    """For each of a tile's boxes a class vector, (N, K) in [0, 1], and two weights, (N,) >= 0; and regions.

    ``weights`` multiply all losses of a box; ``box_weights`` also multiply those for its position: box, DFL and angle.
    ``regions`` (M, 5) are rotated boxes in pixels of the tile, and ``keeps`` (M, K) in [0, 1] is the weight of each
    class's background loss inside them: with 0, nothing there is background.
    """

    vectors: NDArray[np.float32]
    weights: NDArray[np.float32]
    box_weights: NDArray[np.float32]
    regions: NDArray[np.float32]
    keeps: NDArray[np.float32]


def label_softness(
    found: Detections,
    kept: NDArray[np.bool_],
    above_low: NDArray[np.bool_],
    num_classes: int,
    soft: Soft,
    *,
    calibrated: bool,
) -> Softness:
    """The Softness of a tile's soft labels.

    Args:
        found: All that the store has for the tile, calibrated if they are to be.
        kept: (N,) which are above the threshold: the boxes that are learned.
        above_low: (N,) which are above ``soft.ignore_above``.
        num_classes: K.
        soft: The options.
        calibrated: Whether scores are calibrated. If not, and where the teacher has an objectness, scores are divided
            by it to make class vectors, and it enters the weights; calibrated scores are no longer a product with it.
    """
    boxes = found.at(kept)
    vectors = np.eye(num_classes, dtype=np.float32)[boxes.class_ids]
    weights = boxes.best**soft.weight_power if soft.weight_power else np.ones(len(boxes.best), np.float32)
    if soft.class_targets == "vector" and len(boxes.boxes):  # a tile without boxes has no columns for classes
        vectors = boxes.scores
        if boxes.objectness is not None and not calibrated:
            vectors = np.minimum(vectors / np.maximum(boxes.objectness, 1e-9)[:, None], 1)
            weights = weights * boxes.objectness
        if soft.temperature != 1:
            vectors = Mapping(soft.temperature)(vectors)
    below = np.flatnonzero(~kept & (iou_matrix(found.boxes, boxes.boxes).max(axis=1, initial=0) <= SAME_OBJECT_IOU))
    keeps = np.where(above_low, 0.0, 1 - soft.background_doubt * np.where(found.best > _LEAST_DOUBT, found.best, 0))
    regions = below[keeps[below] < 1]
    return Softness(
        vectors.astype(np.float32),
        weights.astype(np.float32),
        _box_weights(boxes, soft.localisation_power),
        rotated.drawn(found.boxes, found.xywhr)[regions].astype(np.float32),
        np.repeat(keeps[regions, None], num_classes, axis=1).astype(np.float32),
    )


def with_parts(softness: Softness, width: int, height: int) -> Softness:
    """The same with added regions that cover the whole tile and in which background counts in full: they show, after
    augmentation, which places belong to this tile."""
    parts = _parts(width, height).astype(np.float32)
    keeps = np.ones((len(parts), softness.keeps.shape[1]), np.float32)
    return replace(
        softness,
        regions=np.concatenate([softness.regions, parts]),
        keeps=np.concatenate([softness.keeps, keeps]),
    )


def _box_weights(boxes: Detections, power: float) -> NDArray[np.float32]:
    """(N,) in [0, 1]: the boxes' agreement to a power; 1 where it is unknown, as that says nothing against a box."""
    if boxes.agreement is None or not power:
        return np.ones(len(boxes.boxes), np.float32)
    return (np.where(np.isnan(boxes.agreement), 1, boxes.agreement) ** power).astype(np.float32)


def truth_softness(tile: dict, truth: Truth, num_classes: int, soft: Soft) -> Softness:
    """The Softness of a tile's truth: one-hot vectors, weights of 1, and regions if ``soft.ignore_truth`` is set.

    The regions are the boxes that evaluation ignores, and the whole tile for the classes that it was not labelled for.
    """
    class_ids = truth.class_ids[~truth.ignore]
    regions, keeps = np.zeros((0, 5), np.float32), np.zeros((0, num_classes), np.float32)
    if soft.ignore_truth:
        regions = rotated.drawn(truth.boxes, truth.xywhr)[truth.ignore]
        keeps = np.zeros((len(regions), num_classes), np.float32)
        if tile["labelled_classes"] is not None:
            parts = _parts(*tile["window"][2:])
            labelled = np.isin(np.arange(num_classes), tile["labelled_classes"])
            regions = np.concatenate([regions, parts])
            keeps = np.concatenate([keeps, np.repeat(labelled[None], len(parts), axis=0)])
    vectors = np.eye(num_classes, dtype=np.float32)[class_ids]
    weights = np.ones(len(class_ids), np.float32)
    return Softness(vectors, weights, weights, regions.astype(np.float32), keeps.astype(np.float32))


def _parts(width: int, height: int) -> NDArray[np.float32]:
    x, y = np.meshgrid(np.arange(_PARTS) + 0.5, np.arange(_PARTS) + 0.5)
    size = np.array([width, height]) / _PARTS
    centres = np.stack([x.ravel(), y.ravel()], axis=1) * size
    return np.concatenate([centres, np.broadcast_to(size, centres.shape), np.zeros((len(centres), 1))], axis=1)
