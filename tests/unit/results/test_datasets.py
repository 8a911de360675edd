"""COCO and YOLO data sets, read back by the project's own truth readers and by the libraries they are for."""

import json

import cv2
import numpy as np
import pytest
from made_stores import CLASSES, detections, made_tile
from pycocotools.coco import COCO
from ultralytics.data.utils import verify_image_label

from softlabel import rotated
from softlabel.config import TruthSource
from softlabel.imagery.truth import read_truth
from softlabel.records import Detections
from softlabel.results import datasets
from softlabel.store import write_text

TILES = [
    made_tile(
        "a/s.tif", (0, 0, 64, 48), detections((1.25, 2, 30.7, 40, 2, 0.9), (0, 0, 64, 48, 0, 0.5)), split="train_1"
    ),
    made_tile("a/s.tif", (64, 0, 64, 48), detections(), split="val_1"),
    made_tile("b/s.tif", (0, 0, 64, 48), detections((5, 6, 7.5, 8.125, 1, 0.7)), split=None),
]


def tiles():
    return ((tile, found) for tile, found, *_ in TILES)


def by_image(truth, size_wh=(64, 48)):
    assert not truth.rejected
    scenes = {name: scene.fitted(*size_wh) for name, scene in truth.scenes.items()}
    assert not any(rejected for _, rejected in scenes.values())
    return {name.rpartition("/")[2]: scene for name, (scene, _) in scenes.items()}


def check_boxes(found, tolerance):
    for tile, expected, *_ in TILES:
        scene = found[datasets.image_file(tile, by_split=False).name]
        np.testing.assert_allclose(scene.boxes, expected.boxes, atol=tolerance)
        assert scene.class_ids.tolist() == expected.class_ids.tolist()
    assert len(found) == len(TILES)


def test_coco_comes_back(tmp_path):
    path = tmp_path / "annotations.json"
    datasets.write_coco(path, tiles, CLASSES, {"teacher": "t", "threshold": 0.3})
    truth = read_truth(TruthSource(format="coco", path=str(path)), tuple(CLASSES))
    found = by_image(truth)
    check_boxes(found, 0)
    assert sorted((one.group, one.split) for one in found.values()) == sorted(
        [("a/s.tif", "train_1"), ("a/s.tif", "val_1"), ("b/s.tif", None)], key=str
    )
    document = json.loads(path.read_text())
    assert document["info"] == {"teacher": "t", "threshold": 0.3}
    assert [one["score"] for one in document["annotations"]] == [0.9, 0.5, 0.7]
    assert [one["id"] for one in document["categories"]] == [1, 2, 3]
    assert [one["tile_id"] for one in document["images"]] == [tile["tile_id"] for tile, _ in tiles()]


def test_pycocotools_reads_it(tmp_path, capsys):
    path = tmp_path / "annotations.json"
    datasets.write_coco(path, tiles, CLASSES, {})
    coco = COCO(str(path))
    assert [len(coco.getAnnIds(imgIds=[image])) for image in coco.getImgIds()] == [2, 0, 1]
    assert coco.loadCats(coco.loadAnns([1])[0]["category_id"])[0]["name"] == "ship"
    assert coco.loadAnns([3])[0]["area"] == 2.5 * 2.125


def test_a_coco_file_of_nothing_is_one(tmp_path):
    datasets.write_coco(tmp_path / "a.json", lambda: iter(()), CLASSES, {})
    assert json.loads((tmp_path / "a.json").read_text())["images"] == []


@pytest.fixture
def yolo(tmp_path):
    """A YOLO folder of the tiles."""
    for tile, found in tiles():
        image = datasets.image_file(tile, by_split=True)
        datasets.write_png(tmp_path / image, np.zeros((48, 64, 3), np.uint8))
        write_text(tmp_path / datasets.label_file(image), datasets.yolo_labels(found, (64, 48)))
    datasets.write_yolo_config(tmp_path, CLASSES, sorted(path.name for path in (tmp_path / "images").iterdir()))
    return tmp_path


def test_yolo_comes_back(yolo):
    truth = read_truth(TruthSource(format="yolo", path=str(yolo / "data.yaml")), tuple(CLASSES))
    assert not truth.rejected
    # A tile of no split is in none of train, val and test, as there are train and val tiles.
    found = by_image(truth)
    outside = datasets.image_file(TILES[2][0], by_split=True)
    assert outside.parent.name == "none" and outside.name not in found
    for tile, expected, *_ in TILES[:2]:
        scene = found[datasets.image_file(tile, by_split=True).name]
        np.testing.assert_allclose(scene.boxes, expected.boxes, atol=1e-5)
        assert scene.class_ids.tolist() == expected.class_ids.tolist()


def test_ultralytics_reads_it(yolo, monkeypatch):
    from ultralytics.data import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda _: None)  # it would look for one on the web
    data = check_det_dataset(str(yolo / "data.yaml"), autodownload=False)
    assert data["names"] == dict(enumerate(CLASSES))
    (labels,) = YOLODataset(img_path=data["train"], data=data, augment=False, imgsz=64).labels
    assert labels["cls"].ravel().tolist() == [2, 0]
    np.testing.assert_allclose(labels["bboxes"][1], [0.5, 0.5, 1, 1])


TURNED = np.array([[30, 20, 20, 8, 0.5], [10, 30, 12, 6, 0.0]], np.float32)


def turned():
    hulls = rotated.hulls(TURNED).astype(np.float32)
    return Detections(hulls, np.array([[0.1, 0.2, 0.9], [0.8, 0.1, 0]], np.float32), xywhr=TURNED)


def test_ultralytics_reads_rotated_boxes(tmp_path, monkeypatch):
    from ultralytics.data import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda _: None)
    tile = {**TILES[0][0], "split": "train"}
    image = datasets.image_file(tile, by_split=True)
    datasets.write_png(tmp_path / image, np.zeros((48, 64, 3), np.uint8))
    write_text(tmp_path / datasets.label_file(image), datasets.yolo_obb_labels(turned(), (64, 48)))
    datasets.write_yolo_config(tmp_path, CLASSES, ["train"])
    data = check_det_dataset(str(tmp_path / "data.yaml"), autodownload=False)
    (labels,) = YOLODataset(img_path=data["train"], data=data, task="obb", augment=False, imgsz=64).labels
    assert labels["cls"].ravel().tolist() == [2, 0]
    corners = [segment * [64, 48] for segment in labels["segments"]]
    for found, expected in zip(corners, rotated.corners(TURNED), strict=True):
        np.testing.assert_allclose(sorted(found.tolist()), sorted(expected.tolist()), atol=1e-4)


def test_dota_comes_back(tmp_path):
    """Corners clockwise on screen, as DOTA has them; upright boxes too."""
    text = datasets.dota_labels(turned(), ["small car", "plane", "ship"])
    *corners, name, difficult = text.splitlines()[1].split()
    assert (name, difficult) == ("small-car", "0")
    assert [float(one) for one in corners] == [16, 27, 16, 33, 4, 33, 4, 27]
    write_text(tmp_path / "labelTxt" / "tile.txt", text)
    truth = read_truth(
        TruthSource(
            format="dota",
            path=str(tmp_path / "labelTxt"),
            mapping={"small-car": "car", "plane": "plane", "ship": "ship"},
        ),
        tuple(CLASSES),
    )
    (scene,) = by_image(truth).values()
    np.testing.assert_allclose(scene.boxes, turned().boxes, atol=0.01)
    assert scene.class_ids.tolist() == [2, 0]
    upright = datasets.dota_labels(TILES[2][1], CLASSES)
    assert upright == "7.50 6.00 7.50 8.12 5.00 8.12 5.00 6.00 plane 0\n"


@pytest.mark.parametrize(
    ("splits", "roles"),
    [
        (["none"], {"train": ["none"], "val": ["none"]}),
        (["train_2"], {"train": ["train_2"], "val": ["train_2"]}),
        (["test"], {"train": ["test"], "val": ["test"], "test": ["test"]}),
        (
            ["test", "train_1", "train_2", "val_1"],
            {"train": ["train_1", "train_2"], "val": ["val_1"], "test": ["test"]},
        ),
    ],
)
def test_splits_become_what_yolo_wants(tmp_path, splits, roles):
    from softlabel.imagery.truth_fields import load_yaml

    datasets.write_yolo_config(tmp_path, ["car"], splits)
    found = load_yaml(tmp_path / "data.yaml")
    assert found == {
        **{role: [f"images/{name}" for name in names] for role, names in roles.items()},
        "names": {0: "car"},
    }


def test_a_split_s_name_leads_to_no_other_folder():
    tile, *_ = made_tile("s", (0, 0, 8, 8), split="../../etc")
    assert ".." not in datasets.image_file(tile, by_split=True).parts


def test_pixels_are_red_green_blue(tmp_path):
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    datasets.write_png(tmp_path / "a.png", pixels)
    assert (cv2.imread(str(tmp_path / "a.png"))[:, :, ::-1] == pixels).all()


def test_a_rotated_box_that_leaves_its_tile_costs_ultralytics_nothing(tmp_path):
    """ultralytics drops an image over one box whose centre lies outside."""
    boxes = np.array([[68, 20, 40, 10, 0.4], [30, 24, 20, 8, 0.3], [32, 24, 200, 160, 1.0]], np.float32)
    found = Detections(rotated.hulls(boxes), np.eye(3, dtype=np.float32), xywhr=boxes)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((48, 64, 3), np.uint8))
    (tmp_path / "a.txt").write_text(datasets.yolo_obb_labels(found, (64, 48)))
    asked = (str(tmp_path / "a.png"), str(tmp_path / "a.txt"), "", False, 3, 0, 0, False)
    image, labels, _, corners, _, _, _, _, corrupt, said = verify_image_label(asked)
    assert image and not corrupt and not said and len(labels) == 3
    inside = rotated.corners(boxes[1:2])[0] / [64, 48]
    np.testing.assert_allclose(sorted(corners[1].tolist()), sorted(inside.tolist()), atol=1e-6)
