"""Anchors that fit the boxes: YOLOv5's auto-anchor, k-means guarded by the best-possible-recall check.

Follows utils/autoanchor.py of YOLOv5 v6.0 to v7.0 (https://github.com/ultralytics/yolov5), without the genetic search
that comes after its k-means.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

_MAX_RATIO = 4.0  # as in the loss: a box needs an anchor whose sides are within this factor of its own
_GOOD_ENOUGH = 0.98
_MIN_SIDE_PX = 2.0  # boxes with both sides below this say nothing about good anchors


def best_possible_recall(sizes_N2: NDArray[np.float32], anchors_px: NDArray[np.float32]) -> float:
    """The share of boxes that some anchor fits within a factor of 4 in width and in height: others cannot be learned.

    Args:
        sizes_N2: Width and height of boxes in pixels of the model's input.
        anchors_px: (..., 2) width and height of the anchors.
    """
    ratio = sizes_N2[:, None] / anchors_px.reshape(1, -1, 2)
    worst_side = np.maximum(ratio, 1 / ratio).max(axis=2)
    return float((worst_side.min(axis=1) < _MAX_RATIO).mean())


def fit_anchors(
    sizes_N2: NDArray[np.float32], anchors_px: NDArray[np.float32], seed: int
) -> tuple[NDArray[np.float32], float, float]:
    """The given anchors if they fit 98 % of the boxes; else the boxes' k-means centres, if these fit better.

    Args:
        sizes_N2: Width and height of the training boxes in pixels of the model's input.
        anchors_px: (levels, anchors, 2), the anchors to start from.
        seed: For k-means.

    Returns:
        The anchors, (levels, anchors, 2), sorted small to large if they are new; their best possible recall; and that
        of the given anchors.
    """
    sizes = sizes_N2[(sizes_N2 > 0).all(axis=1)].astype(np.float32)
    if not len(sizes):
        return anchors_px, 1.0, 1.0
    before = best_possible_recall(sizes, anchors_px)
    count = anchors_px.size // 2
    to_cluster = sizes[(sizes >= _MIN_SIDE_PX).any(axis=1)]
    if before >= _GOOD_ENOUGH or len(np.unique(to_cluster, axis=0)) < count:
        return anchors_px, before, before
    fitted = _kmeans(to_cluster, count, seed).reshape(anchors_px.shape)
    after = best_possible_recall(sizes, fitted)
    return (fitted, after, before) if after > before else (anchors_px, before, before)


def _kmeans(sizes_N2: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """Centres, sorted by area; sizes are in units of their standard deviation, so that width and height weigh alike."""
    unit = np.maximum(sizes_N2.std(axis=0), 1e-6)
    cv2.setRNGSeed(seed)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 100, 1e-4)
    _, _, centres = cv2.kmeans(sizes_N2 / unit, count, None, stop, 10, cv2.KMEANS_PP_CENTERS)  # type: ignore[call-overload]
    anchors = centres * unit
    return anchors[np.argsort(anchors.prod(axis=1))].astype(np.float32)
