"""Several teachers over one tile set: boxes that show one object become one, with a say for each teacher.

Shape suffixes: N counts the boxes of all teachers, M fused ones, T teachers, K classes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel import rotated
from softlabel.errors import StoreError
from softlabel.records import EMPTY, REJECTED, Detections, soft_labels_table
from softlabel.results.merge import cluster
from softlabel.results.stores import Store, open_store, read_shard
from softlabel.store import step_dir, summary

_NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32))


@dataclass(frozen=True)
class FuseJob:
    """``stores`` and their ``weights``, in an order that does not depend on how they were named."""

    stores: tuple[Store, ...]
    weights: tuple[float, ...]
    threshold: float
    iou: float
    run_dir: Path

    def identity(self) -> dict:
        """All that determines the result. Rejected tiles count, since labelling may take them up again."""
        first = self.stores[0]
        teacher = {
            "fused": [store.teacher for store in self.stores],
            "weights": list(self.weights),
            "classes": first.classes,
            "threshold": self.threshold,
            "iou": self.iou,
        }
        return {
            "teacher": teacher,
            "tiles": first.tiles.name,
            "splits": None if first.splits is None else list(first.splits),
            "with_losses": False,
            "rejected": [summary(store.folder)[REJECTED] for store in self.stores],
        }

    @property
    def output(self) -> Path:
        """The folder of the fused store."""
        return step_dir(self.run_dir, "fused", self.identity())


def fuse_job(folders: Sequence[Path], weights: Sequence[float], threshold: float, iou: float, run_dir: Path) -> FuseJob:
    """What fusing these stores means.

    Raises:
        StoreError: A store is not finished, they are of different tiles, splits or classes, or a weight is missing or
            not above 0.
    """
    if len(weights) != len(folders):
        raise StoreError(f"{len(folders)} stores and {len(weights)} weights: give every store one")
    if not all(0 < weight < math.inf for weight in weights):
        raise StoreError(f"weights are {', '.join(f'{weight:g}' for weight in weights)}: each must be above 0")
    stores = [open_store(folder) for folder in folders]
    for store in stores[1:]:
        _check_alike(stores[0], store)
    pairs = sorted(zip(stores, weights, strict=True), key=lambda pair: json.dumps([pair[0].teacher, float(pair[1])]))
    # Floats throughout: 1 and 1.0 would be two folders.
    told = tuple(float(weight) for _, weight in pairs)
    return FuseJob(tuple(store for store, _ in pairs), told, float(threshold), float(iou), run_dir)


def fuse_shard(job: FuseJob, shard: int) -> pa.Table:
    """The rows of one shard of the fused store; a tile that a teacher rejected is rejected with its reason, one that is
    empty to any is empty.

    Raises:
        StoreError: A shard is missing, broken, or one of other tiles.
    """
    by_teacher = [read_shard(store, shard) for store in job.stores]
    found, reasons, retryable, empty = [], [], [], set[str]()
    for tiles in zip(*by_teacher, strict=True):
        bad = [tile for tile in tiles if tile.reason is not None]
        detections = [tile.found for tile in tiles]
        is_empty = any(tile.status == EMPTY for tile in tiles)
        if is_empty:
            empty.add(tiles[0].tile["tile_id"])
        found.append(_NOTHING if bad or is_empty else fuse_tile(detections, job.weights, job.threshold, job.iou))
        reasons.append("; ".join(sorted({tile.reason or "" for tile in bad})) or None)
        retryable.append(all(tile.retryable for tile in bad))
    tile_ids = [tile.tile["tile_id"] for tile in by_teacher[0]]
    num_classes = len(job.stores[0].classes)
    return soft_labels_table(num_classes, tile_ids, found, [None] * len(tile_ids), reasons, retryable, empty)


def fuse_tile(detections: Sequence[Detections], weights: Sequence[float], threshold: float, iou: float) -> Detections:
    """Weighted box fusion (Solovyev et al., arXiv:1910.13302) of what several teachers found in one tile.

    The boxes of all teachers above ``threshold``, best first by weight times best score, are clustered class by class
    (of the best class) around the best ones, as in softlabel.results.merge. A fused box is the mean of its cluster's,
    weighted by weight times best score. Its class vector is the mean of its finders' vectors weighted by their
    weights, times the finders' share of all weights: what only some have found scores less, and may fall below the
    threshold. Two boxes of one teacher in a cluster share that teacher's say. The order of teachers does not matter.

    Args:
        detections: Per teacher what it found; all of the same classes.
        weights: Per teacher, above 0.
        threshold: Boxes of a best score above it take part, strictly.
        iou: Boxes of a class above it are one object.

    Returns:
        Best score first; saturated if any teacher was; without objectness, which not every teacher has. Rotated if any
        teacher's are: upright ones then have the angle 0.
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
    """The boxes of all, None where none is rotated."""
    if all(one.xywhr is None for one in found):
        return None
    parts = [rotated.upright(one.boxes) if one.xywhr is None else one.xywhr for one in found]
    return np.concatenate(parts).astype(np.float64)


def _boxes_of_same_teacher(clusters_N: NDArray[np.int64], teachers_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each box (N,) how many its teacher has in its cluster."""
    pairs = clusters_N * (teachers_N.max() + 1) + teachers_N
    _, positions, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    return counts[positions]


def _totals(clusters_N: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums per cluster (M, ...), in rank order, so that the order of teachers changes no last bit."""
    order_N = np.argsort(clusters_N, kind="stable")
    starts_M = np.flatnonzero(np.diff(clusters_N[order_N], prepend=-1))
    return np.add.reduceat(values[order_N], starts_M)


def _check_alike(first: Store, other: Store) -> None:
    what = {
        "tiles": (first.tiles.name, other.tiles.name),
        "splits": (first.splits, other.splits),
        "classes": (first.classes, other.classes),
    }
    differing = [f"{name}: {one} and {two}" for name, (one, two) in what.items() if one != two]
    if differing:
        raise StoreError(
            f"{other.folder.name} cannot be fused with {first.folder.name} ({'; '.join(differing)}): label the same "
            "tiles, splits and classes with each teacher"
        )
