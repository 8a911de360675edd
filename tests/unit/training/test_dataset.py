"""The training set as ultralytics' losses get it, against ultralytics' own data set of the same images and boxes."""

import random

import cv2
import numpy as np
import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from softlabel import rotated
from softlabel.training.dataset import TileDataset
from softlabel.training.targets import Target

SIZE = 96
DATA = {"names": {0: "car", 1: "ship"}, "nc": 2, "channels": 3}


@pytest.fixture
def written(tmp_path):
    """Four images with rotated boxes, as targets and as the files that ultralytics reads."""
    rng = np.random.default_rng(0)
    images, targets = {}, []
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        name, count = f"{i}.png", i + 1
        images[name] = rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)
        boxes = np.concatenate([rng.uniform(30, 66, (count, 2)), rng.uniform(8, 30, (count, 2))], axis=1)
        boxes = np.concatenate([boxes, rng.uniform(0, np.pi / 2, (count, 1))], axis=1).astype(np.float32)
        class_ids = rng.integers(0, 2, count)
        targets.append(Target(row_of(name), rotated.hulls(boxes), class_ids, xywhr=boxes))
        cv2.imwrite(str(tmp_path / "images" / name), images[name][..., ::-1])
        corners = rotated.corners(boxes).reshape(count, 8) / SIZE
        lines = [" ".join(map(str, [class_id, *line])) for class_id, line in zip(class_ids, corners, strict=True)]
        (tmp_path / "labels" / f"{i}.txt").write_text("\n".join(lines))
    return tmp_path / "images", targets, images


def row_of(name):
    return {"tile_id": name, "window": (0, 0, SIZE, SIZE)}


def settings(**args):
    hyp = get_cfg(overrides={"cache": "ram", **args})
    return {"imgsz": SIZE, "augment": True, "hyp": hyp, "cache": "ram", "data": DATA, "task": "obb"}


def drawn(dataset, index):
    random.seed(index)
    np.random.seed(index)
    torch.manual_seed(index)
    return dataset[index]


@pytest.mark.parametrize("args", [{}, {"degrees": 30.0, "mosaic": 0.0}])
def test_rotated_boxes_come_as_ultralytics_reads_them(written, args):
    folder, targets, images = written
    ours = TileDataset(targets, lambda row: images[row["tile_id"]], **settings(**args))
    theirs = YOLODataset(img_path=str(folder), **settings(**args))
    for index in range(4):
        one, other = drawn(ours, index), drawn(theirs, index)
        assert torch.equal(one["img"], other["img"]) and torch.equal(one["cls"], other["cls"])
        assert one["bboxes"].shape == (len(one["cls"]), 5) and len(one["cls"])
        torch.testing.assert_close(one["bboxes"], other["bboxes"], atol=2e-3, rtol=0)


def test_upright_ones_among_them_have_no_angle(written):
    _, _, images = written
    box = np.array([[20, 30, 60, 50]], np.float32)
    args = {"mosaic": 0.0, "translate": 0.0, "scale": 0.0, "fliplr": 0.0}
    target = Target(row_of("0.png"), box, np.array([1]))
    one = drawn(TileDataset([target], lambda row: images[row["tile_id"]], **settings(**args)), 0)
    (x, y, w, h, r) = one["bboxes"][0].tolist()
    assert (x, y) == pytest.approx((40 / SIZE, 40 / SIZE), abs=1e-3)
    sides = (w, h) if abs(r) < 0.1 else (h, w)
    assert sides == pytest.approx((40 / SIZE, 20 / SIZE), abs=1e-3)
