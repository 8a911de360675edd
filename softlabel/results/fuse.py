"""Several teachers over one tile set: boxes that show the same object become one, with a weight for each teacher."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabel.errors import StoreError
from softlabel.fusion import fuse_tile
from softlabel.records import EMPTY, REJECTED, Detections, soft_labels_table
from softlabel.results.stores import Store, open_store, read_shard
from softlabel.store import step_dir, summary

_NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32))


@dataclass(frozen=True)
class FuseJob:
    """``stores`` and their ``weights``, in an order that does not depend on how they were given."""

    stores: tuple[Store, ...]
    weights: tuple[float, ...]
    threshold: float
    iou: float
    run_dir: Path

    def identity(self) -> dict:
        """All that determines the result, the number of rejected tiles included, since labelling may retry them."""
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
            **({"parents": first.parents} if first.parents else {}),
        }

    @property
    def output(self) -> Path:
        """The folder of the fused store."""
        return step_dir(self.run_dir, "fused", self.identity())


def fuse_job(folders: Sequence[Path], weights: Sequence[float], threshold: float, iou: float, run_dir: Path) -> FuseJob:
    """Check and describe the fusion of these stores.

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
    """The rows of one shard of the fused store; a tile that any teacher rejected is rejected with that reason, else one
    that is empty for any is empty.

    Raises:
        StoreError: A shard is missing, broken, or about other tiles.
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


def _check_alike(first: Store, other: Store) -> None:
    what = {
        "tiles": (first.tiles.name, other.tiles.name),
        "splits": (first.splits, other.splits),
        "classes": (first.classes, other.classes),
        "parents": (first.parents, other.parents),
    }
    differing = [f"{name}: {one} and {two}" for name, (one, two) in what.items() if one != two]
    if differing:
        raise StoreError(
            f"{other.folder.name} cannot be fused with {first.folder.name} ({'; '.join(differing)}): label the same "
            "tiles, splits and classes with each teacher"
        )
