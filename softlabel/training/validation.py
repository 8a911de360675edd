"""What the ranks of a training group look at together: which tiles are empty, validation, training losses."""

from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabel.detectors.tile_loss import mean_losses
from softlabel.detectors.yolo import YoloDetector
from softlabel.errors import NO_LABELS, TrainingError
from softlabel.evaluation.matching import TileResult
from softlabel.imagery.scenes import TileReader
from softlabel.records import Truth
from softlabel.tile_table import read_tiles
from softlabel.training.ranks import gather, rank, world_size
from softlabel.training.targets import WEIGHTS, Target, TrainJob

_AT_ONCE = 128
"""Tiles that the detector gets per call. It makes batches of them, and a GPU has nothing to do between two calls."""


@lru_cache(maxsize=8)  # for all models of a launch
def empty_tiles(tiles: Path, split: str) -> frozenset[str]:
    """A split's tiles with truth that have no valid pixel; every rank looks at its share."""
    rows = [row for row in read_tiles(tiles, [split]) if row["truth"] is not None]
    reader = TileReader()
    mine = rows[rank() :: world_size()]
    found = [row["tile_id"] for row in mine if reader.is_empty(row)]
    reader.close()
    return frozenset(chain.from_iterable(gather(found)))


def without_empty(targets: list[Target], tiles: Path, split: str) -> list[Target]:
    """The targets whose tiles have a valid pixel.

    Raises:
        TrainingError: No box is left.
    """
    empty = empty_tiles(tiles, split)
    seen = [target for target in targets if target.tile["tile_id"] not in empty]
    if not any(len(target.boxes) for target in seen):
        raise TrainingError(f"{NO_LABELS}: every tile of {split} with a box is without a valid pixel")
    return seen


class KeptTiles:
    """Reads tiles, and keeps the pixels of the first ones: an epoch need not read what the one before has read.

    Args:
        most_bytes: How much may be kept; tiles beyond that are read again each time.
    """

    def __init__(self, most_bytes: float) -> None:
        self._reader, self._room = TileReader(), most_bytes
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def read(self, tile: dict) -> NDArray[np.uint8]:
        """As ``TileReader.read``."""
        image = self._kept.get(tile["tile_id"])
        if image is None:
            image = self._reader.read(tile)
            if image.nbytes <= self._room:
                self._kept[tile["tile_id"]], self._room = image, self._room - image.nbytes
        return image

    def close(self) -> None:
        """Close the scene that is open, if one is; what is kept stays."""
        self._reader.close()


def validate(detector: YoloDetector, targets: list[Target], tiles: KeptTiles) -> list[TileResult]:
    """Truth and detections of all tiles, on every rank; each rank runs its share."""
    results, mine = [], targets[rank() :: world_size()]
    for start in range(0, len(mine), _AT_ONCE):
        chunk = mine[start : start + _AT_ONCE]
        images = [tiles.read(target.tile) for target in chunk]
        for target, found in zip(chunk, detector.detect(images), strict=True):
            results.append(TileResult(Truth.from_row(target.tile["truth"]), found, _labelled(target.tile)))
    tiles.close()
    return list(chain.from_iterable(gather(results)))


def _labelled(tile: dict) -> tuple[int, ...] | None:
    return None if tile["labelled_classes"] is None else tuple(tile["labelled_classes"])


def training_losses(job: TrainJob, targets: list[Target]) -> dict[str, float]:
    """The loss of the best weights on the training set, without augmentation, as the test split's is measured."""
    detector = YoloDetector.from_weights(job.folder / WEIGHTS, job.nms)
    reader, mine, sums = TileReader(), targets[rank() :: world_size()], []
    for start in range(0, len(mine), _AT_ONCE):
        chunk = mine[start : start + _AT_ONCE]
        truths = [Truth(t.boxes, t.class_ids.astype(np.int32), t.class_ids < 0, t.xywhr) for t in chunk]
        sums += detector.losses([target.hide_unknown(reader.read(target.tile)) for target in chunk], truths)
    reader.close()
    return mean_losses(detector.loss_names(), [row for part in gather(sums) for row in part])
