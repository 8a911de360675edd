"""Loader workers live as long as a training, and nobody can tell from what it learns."""

import pytest
import torch
from lone_training import EPOCHS, LoneTraining

from softlabel.imagery.scenes import TileReader


@pytest.fixture
def lone(tiles, tmp_path, monkeypatch):
    torch.set_num_threads(1)  # the order of a sum decides its last bits
    return LoneTraining(tiles, tmp_path, torch.device("cpu"), monkeypatch)


def equal(one, other):
    return one[0] == other[0] and all((one[1][key] == other[1][key]).all() for key in one[1])


def test_a_training_is_the_same_with_workers_without_them_and_resumed(lone):
    alone, nobody = lone.train("alone", 0, "ram")
    shared, seen = lone.train("shared", 2, None)
    assert len(alone[0]) == EPOCHS and not any(epoch.workers for epoch in nobody)
    assert equal(alone, shared)
    first, later = [epoch.workers for epoch in seen[:3]], [epoch.workers for epoch in seen[3:]]
    assert first == [first[0]] * 3 and later == [later[0]] * 2 and first[0] and later[0]
    assert not set(first[0]) & set(later[0])  # when mosaic was closed they were started anew
    for until in (2, 4):  # in the midst of mosaic, and after it
        assert lone.train(f"resumed-{until}", 2, "disk", until)[0] is None
        resumed, more = lone.train(f"resumed-{until}", 2, "disk")
        assert len(more) == EPOCHS - until and equal(alone, resumed)


def test_validation_reads_no_scene_after_the_first_epoch(lone, monkeypatch):
    reads, plainly = [], TileReader.read
    monkeypatch.setattr(TileReader, "read", lambda self, row: reads.append(row["tile_id"]) or plainly(self, row))
    lone.train("kept", 0, "ram")
    assert reads and len(reads) == len(set(reads))
