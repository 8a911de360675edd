"""The ranks of a training group share what they look at: each tile once, whatever their number."""

import numpy as np
import pytest

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
        validation.validate(detector, targets)
    boxes = sorted(result.truth.boxes.tolist() for share in shares for result in share)
    assert boxes == sorted(Truth.from_row(target.tile["truth"]).boxes.tolist() for target in targets)
    assert detector.seen == len(targets) > world_size
    assert len(shares) == world_size and all(shares)
