"""The training set as ultralytics' losses get it, against ultralytics' own data set of the same images and boxes."""

import random
import threading
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from softlabel import rotated
from softlabel.training import dataset
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


def tiles_of(images, cache, **more):
    boxes = np.zeros((0, 4), np.float32)
    targets = [
        Target({"tile_id": name, "window": (0, 0, *image.shape[1::-1])}, boxes, np.zeros(0, np.int64))
        for name, image in images.items()
    ]
    reads = []

    def read(row):
        reads.append((row["tile_id"], threading.get_ident()))
        return images[row["tile_id"]]

    return TileDataset(targets, read, **{**settings(cache=cache), "cache": cache, "task": "detect", **more}), reads


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_a_cache_reads_every_tile_once_and_holds_it_scaled(cache):
    rng = np.random.default_rng(0)
    images = {str(i): rng.integers(0, 255, (40 + i, 80, 3), np.uint8) for i in range(20)}
    kept, reads = tiles_of(images, cache)
    plain, _ = tiles_of(images, None)
    for i in range(20):
        (image, size, scaled), expected = kept.load_image(i), plain.load_image(i)
        np.testing.assert_array_equal(image, expected[0])
        assert (size, scaled) == expected[1:] == ((40 + i, 80), image.shape[:2])
    assert kept[3]["img"].shape == (3, SIZE, SIZE)
    assert sorted(name for name, _ in reads) == sorted(images)
    assert threading.get_ident() not in {thread for _, thread in reads}


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_tiles_that_do_not_fit_are_read_when_they_are_needed(cache, monkeypatch, capsys):
    monkeypatch.setattr(dataset.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * SIZE * SIZE * 3 - 1))
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda folder: SimpleNamespace(free=SIZE * SIZE * 3))
    tiles, reads = tiles_of({"a": np.zeros((SIZE, SIZE, 3), np.uint8)}, cache)
    assert tiles.ims == [None] and not reads
    assert capsys.readouterr().out.startswith("softlabel: no room for args.cache: ")
    assert tiles[0]["img"].shape == (3, SIZE, SIZE) and reads


def test_without_a_cache_only_the_last_tiles_are_in_memory():
    images = {str(i): np.zeros((SIZE, SIZE, 3), np.uint8) for i in range(20)}
    tiles, reads = tiles_of(images, None, batch_size=1)
    for i in range(20):
        tiles.load_image(i)
    assert [i for i, image in enumerate(tiles.ims) if image is not None] == list(range(12, 20))
    tiles.load_image(19)
    assert len(reads) == 20
