"""Greedy clusters of boxes that show the same object, upright or rotated, for any number of boxes.

Boxes are xyxy, x right, y down, in pixels, float64; rotated ones are xywhr (softlabel.rotated), with their hulls as
xyxy. Shape suffixes: N counts boxes, P pairs of boxes.
"""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from softlabel import boxes as box_math
from softlabel import rotated

Boxes = NDArray[np.float64]

_MAX_PAIRS = 500_000  # held at once: about 100 MB


@dataclass(frozen=True)
class Shapes:
    """Boxes, upright or rotated."""

    boxes: Boxes
    xywhr: Boxes | None

    def at(self, index: NDArray) -> "Shapes":
        """A selection or reordering of them, by mask or index."""
        return Shapes(self.boxes[index], None if self.xywhr is None else self.xywhr[index])

    def polygons(self) -> NDArray[np.object_]:
        """Shapely polygons (N,)."""
        return shapely.box(*self.boxes.T) if self.xywhr is None else rotated.polygons(self.xywhr)

    def areas(self) -> NDArray[np.float64]:
        """Areas (N,) in square pixels."""
        upright = self.boxes if self.xywhr is None else rotated.unturned(self.xywhr)
        return box_math.area(upright).astype(np.float64)

    def shared(self, a_P: NDArray[np.int64], b_P: NDArray[np.int64]) -> NDArray[np.float64]:
        """Intersection areas (P,) of pairs."""
        if self.xywhr is not None:
            return rotated.overlaps(self.xywhr[a_P], self.xywhr[b_P])
        a_P4, b_P4 = self.boxes[a_P], self.boxes[b_P]
        wh_P2 = np.minimum(a_P4[:, 2:], b_P4[:, 2:]) - np.maximum(a_P4[:, :2], b_P4[:, :2])
        return np.clip(wh_P2, 0, None).prod(axis=1)


def cluster(
    boxes_N4: Boxes,
    class_ids_N: NDArray[np.int64],
    edge_N: NDArray[np.bool_],
    iou: float,
    xywhr_N5: Boxes | None = None,
) -> NDArray[np.int64]:
    """Greedy clusters, class by class: the first box in none starts one, and takes in the free ones that it matches.

    Without cut boxes, the boxes that start clusters are those that greedy NMS keeps.

    Args:
        boxes_N4: In rank order.
        class_ids_N: Boxes of different classes never match.
        edge_N: Which boxes are cut: these match also where more than ``iou`` of their own area is in the better box.
        iou: Boxes with an IoU above it match.
        xywhr_N5: The boxes themselves where they are rotated.

    Returns:
        (N,) for each box, the index of the one that started its cluster.
    """
    return cluster_shapes(Shapes(boxes_N4, xywhr_N5), class_ids_N, edge_N, iou)


def cluster_shapes(
    shapes: Shapes, class_ids_N: NDArray[np.int64], edge_N: NDArray[np.bool_], iou: float
) -> NDArray[np.int64]:
    """`cluster` for boxes of either kind."""
    seeds_N = np.empty(len(class_ids_N), np.int64)
    for class_id in np.unique(class_ids_N):
        of_class = np.flatnonzero(class_ids_N == class_id)
        seeds_N[of_class] = of_class[_cluster_class(shapes.at(of_class), edge_N[of_class], iou)]
    return seeds_N


def _cluster_class(shapes: Shapes, edge_N: NDArray[np.bool_], iou: float) -> NDArray[np.int64]:
    """`cluster` for boxes of one class.

    Boxes query the tree for their neighbours in batches, and only boxes that no better one has taken; once half of the
    tree's boxes are settled, it is rebuilt from the others. So a heap of boxes is settled by its first few.
    """
    polygons_N, areas_N = shapes.polygons(), shapes.areas()
    seeds_N = np.full(len(polygons_N), -1)
    waiting = in_tree = np.arange(len(polygons_N))
    tree, at_once = shapely.STRtree(polygons_N), 1
    while len(waiting):
        asking, waiting = waiting[:at_once], waiting[at_once:]
        position_P, found_P = tree.query(polygons_N[asking])
        at_once = _next_at_once(at_once, len(found_P))
        better_P, worse_P = _matches(shapes, areas_N, edge_N, asking[position_P], in_tree[found_P], iou)
        _take(seeds_N, asking, better_P, worse_P)
        waiting = waiting[seeds_N[waiting] < 0]
        if len(waiting) < len(in_tree) / 2:
            in_tree, tree = waiting, shapely.STRtree(polygons_N[waiting])
    return seeds_N


def _next_at_once(at_once: int, pairs: int) -> int:
    """How many boxes the next batch has: twice as many, or fewer where that would give too many pairs to hold."""
    return max(1, min(2 * at_once, at_once * _MAX_PAIRS // max(pairs, 1)))


def _matches(
    shapes: Shapes,
    areas_N: NDArray[np.float64],
    edge_N: NDArray[np.bool_],
    better_P: NDArray[np.int64],
    worse_P: NDArray[np.int64],
    iou: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs whose second box ranks behind the first and matches it."""
    behind_P = worse_P > better_P
    better_P, worse_P = better_P[behind_P], worse_P[behind_P]
    shared_P = shapes.shared(better_P, worse_P)
    match_P = ratio(shared_P, areas_N[better_P] + areas_N[worse_P] - shared_P) > iou
    match_P |= edge_N[worse_P] & (ratio(shared_P, areas_N[worse_P]) > iou)  # most of a cut box lies inside
    return better_P[match_P], worse_P[match_P]


def _take(
    seeds_N: NDArray[np.int64], asking: NDArray[np.int64], better_P: NDArray[np.int64], worse_P: NDArray[np.int64]
) -> None:
    """Let boxes, best first, start clusters and take in what they match, unless they were taken themselves."""
    order_P = np.argsort(better_P, kind="stable")
    worse_P = worse_P[order_P]
    firsts = np.searchsorted(better_P[order_P], asking, "left").tolist()
    stops = np.searchsorted(better_P[order_P], asking, "right").tolist()
    for seed, first, stop in zip(asking.tolist(), firsts, stops, strict=True):
        if seeds_N[seed] < 0:
            seeds_N[seed] = seed
            taken = worse_P[first:stop]
            seeds_N[taken[seeds_N[taken] < 0]] = seed


def ratio(part_P: box_math.Floats, whole_P: box_math.Floats) -> NDArray[np.float64]:
    """The quotients (P,), 0 where the whole is 0."""
    return np.divide(part_P, whole_P, out=np.zeros(len(part_P)), where=whole_P > 0)
