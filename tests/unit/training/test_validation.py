"""The ranks of a training group share what they look at: each tile once, whatever their number."""

import numpy as np
import pytest

from softlabel.imagery.scenes import TileReader
from softlabel.records import Detections, Truth
from softlabel.training import validation
from softlabel.training.targets import truth_targets


class Nothing:
    """A detector that finds nothing, and counts the tiles that it is shown."""

    seen = 0

    def detect(self, images):
        self.seen += len(images)
        return [Detections(np.zeros((0, 4), np.float32), np.zeros((0, 3), np.float32)) for _ in images]


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_tile_is_validated_by_one_rank(world_size, tiles, monkeypatch):
    targets = truth_targets(tiles, "test")
    shares, detector = [], Nothing()
    monkeypatch.setattr(validation, "world_size", lambda: world_size)
    monkeypatch.setattr(validation, "gather", lambda share: shares.append(share) or [share])
    for rank in range(world_size):
        monkeypatch.setattr(validation, "rank", lambda rank=rank: rank)
        validation.validate(detector, targets, validation.KeptTiles(0))
    boxes = sorted(result.truth.boxes.tolist() for share in shares for result in share)
    assert boxes == sorted(Truth.from_row(target.tile["truth"]).boxes.tolist() for target in targets)
    assert detector.seen == len(targets) > world_size
    assert len(shares) == world_size and all(shares)


@pytest.mark.parametrize(("room", "read_again"), [(0, 1.0), (2.5, None), (float("inf"), 0.0)])
def test_an_epoch_reads_no_tile_that_an_earlier_one_kept(room, read_again, tiles, monkeypatch):
    targets, read = truth_targets(tiles, "test"), []
    monkeypatch.setattr(validation, "rank", lambda: 0)
    monkeypatch.setattr(validation, "world_size", lambda: 1)
    monkeypatch.setattr(validation, "gather", lambda share: [share])
    plainly = TileReader.read
    monkeypatch.setattr(TileReader, "read", lambda self, row: read.append(row["tile_id"]) or plainly(self, row))
    size = plainly(TileReader(), targets[0].tile).nbytes
    kept, shown = validation.KeptTiles(room * size), []

    class Looking(Nothing):
        def detect(self, images):
            shown.append([image.copy() for image in images])
            return super().detect(images)

    for _ in range(2):
        validation.validate(Looking(), targets, kept)
    expected = len(targets) - 2 if read_again is None else round(read_again * len(targets))
    assert len(targets) > 2 and len(read) == len(targets) + expected
    np.testing.assert_array_equal(shown[0], shown[1])
