"""What a student learns from: thresholds per class, and subsets of tiles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_stores import CLASSES, detections, made_store, made_tile, write_store, write_tiles
from ultralytics.cfg import get_cfg

from softlabel import rotated
from softlabel.errors import TrainingError
from softlabel.records import Detections, Nms
from softlabel.training.dataset import TileDataset
from softlabel.training.targets import TrainJob, truth_targets


@pytest.fixture
def job(tmp_path):
    """Makes a job on forty tiles, each with a car, a plane and a ship at 0.4."""
    found = detections((1, 1, 9, 9, 0, 0.4), (11, 1, 19, 9, 1, 0.4), (21, 1, 29, 9, 2, 0.4))
    made = [made_tile("scene", (64 * i, 0, 64, 64), found, split="train_2") for i in range(40)]
    store = made_store(tmp_path, made)

    def make(threshold, subset=1.0):
        tiles, model = tmp_path / "tiles-made", "yolov5n.yaml"
        splits = ("train_2", "val_1", store)
        return TrainJob(
            "s", Path("s"), tuple(CLASSES), model, None, {}, tiles, *splits, threshold, None, subset, 0, Nms()
        )

    return make


def test_each_class_has_its_own_threshold(job):
    for target in job({"car": 0.3, "plane": 0.5, "ship": 0.39}).targets():
        assert target.class_ids.tolist() == [0, 2]
    with pytest.raises(TrainingError, match="no soft label of"):
        job(dict.fromkeys(CLASSES, 0.4)).targets()  # strictly above


def test_a_model_of_rotated_boxes_wants_some(job, tmp_path):
    upright = replace(job(0.3), model="yolo11n-obb.yaml")
    with pytest.raises(TrainingError, match=r"yolo11n-obb\.yaml learns rotated boxes, and those of .* are upright"):
        upright.targets()
    xywhr = [16, 16, 10, 6, 0.5]
    truth = [{"box": (10, 11, 22, 21), "class_id": 1, "visible": 1.0, "ignore": False, "xywhr": xywhr}]
    tiles = write_tiles(tmp_path, [made_tile("a", (0, 0, 64, 64), truth=truth, split="train_2")], name="tiles-turned")
    (target,) = replace(upright, tiles=tiles, soft_labels=None).targets()
    assert target.xywhr.tolist() == [xywhr]
    two = np.array([xywhr, [40, 40, 8, 4, 0.25]], np.float32)
    found = Detections(rotated.hulls(two), np.array([[0.9, 0, 0], [0, 0, 0.2]], np.float32), xywhr=two)
    store = write_store(
        tmp_path, [made_tile("a", (0, 0, 64, 64), found, split="train_2")], tiles="tiles-turned", weights="turned"
    )
    (target,) = replace(upright, tiles=tiles, soft_labels=store).targets()
    assert target.xywhr.tolist() == two[:1].tolist() and target.class_ids.tolist() == [0]


def test_an_object_of_unknown_class_is_hidden_but_where_a_known_one_is(tmp_path):
    drawn = [((10, 10, 30, 30), -1, True), ((20.5, 20.5, 40, 40), 1, False), ((50, 0, 60, 9), 0, True)]
    truth = [{"box": box, "class_id": k, "visible": 1.0, "ignore": ignore} for box, k, ignore in drawn]
    tiles = write_tiles(tmp_path, [made_tile("a", (0, 0, 64, 64), truth=truth, split="train_1")])
    (target,) = truth_targets(tiles, "train_1")
    assert target.class_ids.tolist() == [1] and target.unknown.tolist() == [[10, 10, 30, 30]]
    image = np.random.default_rng(0).integers(0, 100, (64, 64, 3), np.uint8)
    seen = target.hide_unknown(image)
    hidden = (seen == 114).all(axis=2)
    expected = np.zeros((64, 64), bool)
    expected[10:30, 10:30] = True
    expected[20:40, 20:40] = False
    np.testing.assert_array_equal(hidden, expected)
    np.testing.assert_array_equal(seen[~hidden], image[~hidden])
    data = {"names": {0: "car"}, "nc": 1, "channels": 3}
    read = TileDataset([target], lambda row: image, imgsz=64, augment=False, hyp=get_cfg(), data=data).load_image(0)[0]
    np.testing.assert_array_equal(read, seen[..., ::-1])


def test_a_subset_is_the_same_each_time_and_part_of_a_larger_one(job):
    ids = {share: [t.tile["tile_id"] for t in job(0.3, share).targets()] for share in (0.25, 0.5, 1.0)}
    assert [len(found) for found in ids.values()] == [10, 20, 40]
    assert set(ids[0.25]) < set(ids[0.5]) < set(ids[1.0])
    assert ids[0.25] == [t.tile["tile_id"] for t in job(0.6 - 0.3, 0.25).targets()]
