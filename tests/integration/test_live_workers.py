"""Loader workers live as long as a training, and nobody can tell from what it learns."""

import numpy as np
import pytest
import torch
from lone_training import EPOCHS, LoneTraining
from made_stores import detections, write_store

from softlabel.config import Soft
from softlabel.imagery.scenes import TileReader
from softlabel.records import Truth
from softlabel.tile_table import read_tiles


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


def test_a_training_with_every_soft_option_goes_on_as_if_undisturbed(lone, tiles, tmp_path):
    """Labels are truth with scores, of which a soft teacher finds others; left before and after it begins."""
    soft = Soft(
        class_targets="vector",
        weight_power=0.5,
        ignore_above=0.2,
        background_far=0.5,
        background_doubt=0.5,
        smoothing=0.3,
        supplement={"share": 0.4, "split": "train_2"},
        soft_teacher={"threshold": 0.01, "burn_in": 0.5},
    )
    of_job = {"soft_labels": judged_store(tmp_path, tiles), "threshold": 0.5, "soft": soft}
    alone, _ = lone.train("alone", 0, "ram", **of_job)
    begins = 3  # of five epochs
    for until in (2, begins + 1):
        assert lone.train(f"resumed-{until}", 2, "ram", until, **of_job)[0] is None
        assert equal(alone, lone.train(f"resumed-{until}", 2, "ram", **of_job)[0])
    stored, _ = lone.train("stored", 0, "ram", **{**of_job, "soft": soft.model_copy(update={"soft_teacher": None})})
    assert stored[0][:begins] == alone[0][:begins] and stored[0][begins:] != alone[0][begins:]


def judged_store(run_dir, tiles):
    """A store of soft labels that are truth with scores from 0 to 1."""
    made, rng = [], np.random.default_rng(0)
    for row in read_tiles(tiles):
        truth = Truth.from_row(row["truth"])
        boxes = [
            (*box, k, s) for box, k, s in zip(truth.boxes, truth.class_ids, rng.random(len(truth.boxes)), strict=True)
        ]
        made.append((row, detections(*sorted(boxes, key=lambda box: -box[-1])), None, False))
    return write_store(run_dir, made, tiles=tiles.name, splits=["train_1"])
