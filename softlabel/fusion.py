"""Weighted box fusion of what several teachers found in one tile, with a weight for each.

Shape suffixes: N counts the boxes of all teachers, M fused ones, K classes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from softlabel import rotated
from softlabel.clusters import cluster
from softlabel.records import Detections


def fuse_tile(detections: Sequence[Detections], weights: Sequence[float], threshold: float, iou: float) -> Detections:
    """Weighted box fusion (Solovyev et al., arXiv:1910.13302) of what several teachers found in one tile.

    The boxes of all teachers above ``threshold``, ranked by weight times best score, are clustered around the best ones
    (softlabel.clusters), separately for each best class. A fused box is the mean of its cluster's boxes, weighted by
    weight times best score. Its class vector is the mean of the vectors of the teachers that found it, weighted by
    their weights, times their share of all weights: what only some teachers found scores less, and may fall below the
    threshold. Two boxes of one teacher in a cluster share that teacher's weight. The order of teachers does not matter.

    Args:
        detections: What each teacher found; all with the same classes.
        weights: One per teacher, above 0.
        threshold: Boxes whose best score is strictly above it take part.
        iou: Boxes of one class with an IoU above it are one object.

    Returns:
        Best score first; saturated if any teacher was; without objectness, which not every teacher has, and without
        agreement, which is about one teacher's candidates. Rotated if any teacher's boxes are: upright ones then by 0.
    """
    above = [found.above(threshold) for found in detections]
    finders = [(found, float(weight)) for found, weight in zip(above, weights, strict=True) if len(found.boxes)]
    saturated = any(found.saturated for found in detections)
    if not finders:
        return Detections(np.zeros((0, 4), np.float32), above[0].scores[:0], saturated)
    boxes, scores, xywhr = _fuse(finders, float(np.sum(sorted(weights))), iou)
    turned = () if xywhr is None else xywhr.T
    order = np.lexsort((*turned, *scores.T, *boxes.T[::-1], -scores.max(axis=1)))
    return Detections(boxes, scores, saturated, xywhr=xywhr).at(order)


def _fuse(
    finders: Sequence[tuple[Detections, float]], all_weights: float, iou: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]:
    boxes_N4 = np.concatenate([found.boxes for found, _ in finders]).astype(np.float64)
    xywhr_N5 = _rotated([found for found, _ in finders])
    scores_NK = np.concatenate([found.scores for found, _ in finders]).astype(np.float64)
    weights_N = np.concatenate([np.full(len(found.boxes), weight) for found, weight in finders])
    teachers_N = np.concatenate([np.full(len(found.boxes), i) for i, (found, _) in enumerate(finders)])
    says_N = weights_N * scores_NK.max(axis=1)
    order_N = np.lexsort((weights_N, *scores_NK.T, *boxes_N4.T[::-1], -says_N))
    boxes_N4, scores_NK, weights_N = boxes_N4[order_N], scores_NK[order_N], weights_N[order_N]
    teachers_N, says_N = teachers_N[order_N], says_N[order_N]
    xywhr_N5 = None if xywhr_N5 is None else xywhr_N5[order_N]
    seeds_N = cluster(boxes_N4, scores_NK.argmax(axis=1), np.zeros(len(boxes_N4), bool), iou, xywhr_N5)
    clusters_N = np.unique(seeds_N, return_inverse=True)[1]
    shares_N = weights_N / _boxes_of_same_teacher(clusters_N, teachers_N) / all_weights
    scores_MK = _totals(clusters_N, scores_NK * shares_N[:, None]).astype(np.float32)

    def mean(values: NDArray[np.float64]) -> NDArray[np.float32]:
        found = _totals(clusters_N, values * says_N[:, None]) / _totals(clusters_N, says_N[:, None])
        return found.astype(np.float32)

    if xywhr_N5 is None:
        return mean(boxes_N4), scores_MK, None
    xywhr_M5 = rotated.regularized(mean(rotated.aligned(xywhr_N5, xywhr_N5[seeds_N, 4])))
    return rotated.hulls(xywhr_M5), scores_MK, xywhr_M5


def _rotated(found: Sequence[Detections]) -> NDArray[np.float64] | None:
    """All boxes as rotated ones, None where none is rotated."""
    if all(one.xywhr is None for one in found):
        return None
    parts = [rotated.drawn(one.boxes, one.xywhr) for one in found]
    return np.concatenate(parts).astype(np.float64)


def _boxes_of_same_teacher(clusters_N: NDArray[np.int64], teachers_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each box, (N,), how many boxes its teacher has in its cluster."""
    pairs = clusters_N * (teachers_N.max() + 1) + teachers_N
    _, positions, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    return counts[positions]


def _totals(clusters_N: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums per cluster (M, ...), in rank order, so that the order of teachers does not change even the last bit."""
    order_N = np.argsort(clusters_N, kind="stable")
    starts_M = np.flatnonzero(np.diff(clusters_N[order_N], prepend=-1))
    return np.add.reduceat(values[order_N], starts_M)
