"""What the ranks of a training group look at together: which tiles are empty, validation, training losses."""

from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from softlabel.detectors.tile_loss import mean_losses
from softlabel.detectors.yolo import YoloDetector
from softlabel.errors import NO_LABELS, TrainingError
from softlabel.evaluation.matching import TileResult
from softlabel.imagery.scenes import TileReader
from softlabel.records import Truth
from softlabel.store import read_tiles
from softlabel.training.ranks import gather, rank, world_size
from softlabel.training.targets import WEIGHTS, Target, TrainJob

_BATCH = 16  # tiles per forward pass


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
    """Those with a valid pixel.

    Raises:
        TrainingError: No box is left.
    """
    empty = empty_tiles(tiles, split)
    seen = [target for target in targets if target.tile["tile_id"] not in empty]
    if not any(len(target.boxes) for target in seen):
        raise TrainingError(f"{NO_LABELS}: every tile of {split} with a box is without a valid pixel")
    return seen


def validate(detector: YoloDetector, targets: list[Target]) -> list[TileResult]:
    """Truth and detections of tiles, on every rank; each looks at its share."""
    reader, results, mine = TileReader(), [], targets[rank() :: world_size()]
    for start in range(0, len(mine), _BATCH):
        chunk = mine[start : start + _BATCH]
        images = [reader.read(target.tile) for target in chunk]
        for target, found in zip(chunk, detector.detect(images), strict=True):
            results.append(TileResult(Truth.from_row(target.tile["truth"]), found, _labelled(target.tile)))
    reader.close()
    return list(chain.from_iterable(gather(results)))


def _labelled(tile: dict) -> tuple[int, ...] | None:
    return None if tile["labelled_classes"] is None else tuple(tile["labelled_classes"])


def training_losses(job: TrainJob, targets: list[Target]) -> dict[str, float]:
    """The loss of the best weights on the training set, without augmentation, as the test split's is measured."""
    detector = YoloDetector.from_weights(job.folder / WEIGHTS, job.nms)
    reader, mine, sums = TileReader(), targets[rank() :: world_size()], []
    for start in range(0, len(mine), _BATCH):
        chunk = mine[start : start + _BATCH]
        truths = [Truth(t.boxes, t.class_ids.astype(np.int32), t.class_ids < 0, t.xywhr) for t in chunk]
        sums += detector.losses([target.hide_unknown(reader.read(target.tile)) for target in chunk], truths)
    reader.close()
    return mean_losses(detector.loss_names(), [row for part in gather(sums) for row in part])
