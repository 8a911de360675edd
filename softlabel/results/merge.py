"""One scene's detections from its overlapping tiles: an object on a seam is found twice, and becomes one.

Boxes are xyxy, x right, y down, in scene pixels, float64; rotated ones are xywhr (softlabel.rotated), with their hulls
as xyxy. Shape suffixes: N counts boxes that go in, M those that come out, K classes, P pairs of boxes.

A box touching a border that its tile shares with another is likely an object cut in two. Such a *cut* box ranks behind
every whole one, and also joins a better box where most of it lies inside that one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from softlabel import rotated
from softlabel.clusters import Boxes, Shapes, cluster_shapes, ratio

Method = Literal["nms", "wbf"]
Scores = NDArray[np.float32]

EDGE_PX = 2.0
"""How near to a tile's border a box counts as cut: a detector misses by a pixel or two."""


@dataclass(frozen=True)
class Merged:
    """Objects, best score first.

    Attributes:
        boxes: (M, 4), for rotated ones the hulls.
        scores: (M, K) class vectors.
        members: (M,) how many boxes each stands for.
        xywhr: (M, 5), None where boxes are upright.
    """

    boxes: Boxes
    scores: Scores
    members: NDArray[np.int64]
    xywhr: Boxes | None = None


def merge(
    boxes_N4: Boxes,
    scores_NK: Scores,
    edge_N: NDArray[np.bool_],
    xywhr_N5: Boxes | None = None,
    *,
    method: Method,
    iou: float,
) -> Merged:
    """Make one box of those that show the same object, separately for each best class.

    Boxes are ranked (`rank`) and clustered around the best ones (softlabel.clusters); class vectors are merged too:

    - ``nms`` keeps each cluster's first box, with the elementwise maximum of its vectors;
    - ``wbf`` takes the mean of the cluster's boxes, weighted by best score, and the plain mean of its vectors. This is
      weighted box fusion (Solovyev et al., arXiv:1910.13302) with three changes. Boxes are compared with the first box
      of a cluster, not with its mean so far, which would change with every box and make the cost quadratic. The score
      is not lowered for boxes found in few tiles, since how many tiles see an object says nothing about it. And cut
      boxes do not shift a mean: only boxes with an IoU above ``iou`` with the first one count, and cut ones only if the
      first one is cut too.
      Rotated boxes are turned by quarters to the first one's angle before their mean is taken.

    The result depends neither on the order of the boxes nor on how they were dealt out to tiles.

    Args:
        boxes_N4: In scene pixels.
        scores_NK: Class vectors in [0, 1]; K >= 1 also where N is 0.
        edge_N: Which boxes are cut (`cut_by_tiles`).
        xywhr_N5: The boxes themselves where they are rotated: then IoU is of their polygons.
        method: ``nms`` or ``wbf``.
        iou: Boxes of one class with an IoU above it are one object; in [0, 1].
    """
    if not len(boxes_N4):
        return Merged(boxes_N4, scores_NK, np.zeros(0, np.int64), xywhr_N5)
    order_N = rank(boxes_N4, scores_NK, edge_N, xywhr_N5)
    scores_NK, edge_N = scores_NK[order_N], edge_N[order_N]
    shapes = Shapes(boxes_N4, xywhr_N5).at(order_N)
    seeds_N = cluster_shapes(shapes, scores_NK.argmax(axis=1), edge_N, iou)
    by_cluster_N = np.argsort(seeds_N, kind="stable")
    seeds_M, starts_M, members_M = np.unique(seeds_N[by_cluster_N], return_index=True, return_counts=True)
    if method == "nms":
        merged = shapes.at(seeds_M)
        vectors_MK = np.maximum.reduceat(scores_NK[by_cluster_N], starts_M)
    else:
        counts_N = _count_in_mean(shapes, edge_N, seeds_N, iou)
        merged, vectors_MK = _means(shapes, scores_NK, seeds_N, counts_N, by_cluster_N, starts_M)
    order_M = rank(merged.boxes, vectors_MK, np.zeros(len(merged.boxes), bool), merged.xywhr)
    merged = merged.at(order_M)
    return Merged(merged.boxes, vectors_MK[order_M], members_M[order_M], merged.xywhr)


def cut_by_tiles(boxes_N4: Boxes, windows_N4: NDArray[np.integer], outline_xyxy: Sequence[int]) -> NDArray[np.bool_]:
    """Which boxes (N,) come within 2 px of a border of their tile that is not the scene's own.

    Args:
        boxes_N4: In scene pixels.
        windows_N4: Each box's tile: column, row, width, height.
        outline_xyxy: The outline of all tiles of the scene together.
    """
    low_N2, high_N2 = windows_N4[:, :2], windows_N4[:, :2] + windows_N4[:, 2:]
    at_low_N2 = (boxes_N4[:, :2] < low_N2 + EDGE_PX) & (low_N2 > outline_xyxy[:2])
    at_high_N2 = (boxes_N4[:, 2:] > high_N2 - EDGE_PX) & (high_N2 < outline_xyxy[2:])
    at_border_N2 = at_low_N2 | at_high_N2
    return at_border_N2[:, 0] | at_border_N2[:, 1]


def rank(
    boxes_N4: Boxes, scores_NK: Scores, edge_N: NDArray[np.bool_], xywhr_N5: Boxes | None = None
) -> NDArray[np.int64]:
    """The order of boxes, best first: whole before cut, then by best score; equal ones by box, then by class vector."""
    best_N = scores_NK.max(axis=1)
    turned = () if xywhr_N5 is None else xywhr_N5.T
    return np.lexsort((*turned, *scores_NK.T, *boxes_N4.T[::-1], -best_N, edge_N))


def _count_in_mean(
    shapes: Shapes, edge_N: NDArray[np.bool_], seeds_N: NDArray[np.int64], iou: float
) -> NDArray[np.bool_]:
    itself_N, areas_N = np.arange(len(seeds_N)), shapes.areas()
    shared_N = shapes.shared(seeds_N, itself_N)
    close_N = ratio(shared_N, areas_N[seeds_N] + areas_N - shared_N) > iou
    return (close_N & (edge_N == edge_N[seeds_N])) | (seeds_N == itself_N)


def _means(
    shapes: Shapes,
    scores_NK: Scores,
    seeds_N: NDArray[np.int64],
    counts_N: NDArray[np.bool_],
    by_cluster_N: NDArray[np.int64],
    starts_M: NDArray[np.int64],
) -> tuple[Shapes, Scores]:
    """Weighted mean boxes (M, ...) and mean vectors (M, K) of the boxes that count; sums run in rank order."""
    # A weight of 0 for all of a cluster would leave it without a box.
    weights_N = np.maximum(scores_NK.max(axis=1).astype(np.float64), np.finfo(np.float64).tiny) * counts_N

    def totals(values: NDArray) -> NDArray[np.float64]:
        return np.add.reduceat(values[by_cluster_N].astype(np.float64), starts_M)

    def mean(values: NDArray) -> NDArray[np.float64]:
        return totals(values * weights_N[:, None]) / totals(weights_N)[:, None]

    vectors_MK = (totals(scores_NK * counts_N[:, None]) / totals(counts_N)[:, None]).astype(np.float32)
    if shapes.xywhr is None:
        return Shapes(mean(shapes.boxes), None), vectors_MK
    means_M5 = rotated.regularized(mean(rotated.aligned(shapes.xywhr, shapes.xywhr[seeds_N, 4])))
    return Shapes(rotated.hulls(means_M5), means_M5), vectors_MK
