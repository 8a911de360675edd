"""A model of rotated boxes labels: its angles are in the store, in what is made of it, and nowhere where hulls do."""

import json

import geopandas as gpd
import numpy as np
import pytest
import torch
from conftest import CLASSES, tiny_recipe
from ultralytics.nn.tasks import OBBModel

from softlabel import rotated
from softlabel.detectors.yolo import YoloDetector
from softlabel.evaluation.run import evaluate_store, numbers
from softlabel.imagery.scenes import TileReader
from softlabel.labelling.job import recipe_label_job
from softlabel.labelling.run import label
from softlabel.records import Nms
from softlabel.results.fuse import fuse_job
from softlabel.results.run import export, fuse
from softlabel.results.stores import open_store, read_all
from softlabel.training.targets import soft_targets

pytestmark = pytest.mark.usefixtures("ray_session")
FLOOR = 0.05


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A .pt of an untrained OBB model whose boxes, scores and angles follow the pixels."""
    torch.manual_seed(0)
    model = OBBModel("yolo11n-obb.yaml", nc=3, verbose=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    for angle, scores in zip(model.model[-1].cv4, model.model[-1].cv3, strict=True):
        torch.nn.init.normal_(angle[-1].weight, std=1.0)
        torch.nn.init.normal_(scores[-1].weight, std=0.1)
        torch.nn.init.constant_(scores[-1].bias, -3.0)
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 128, 128))
    model.names = dict(enumerate(CLASSES))
    path = tmp_path_factory.mktemp("obb") / "best.pt"
    torch.save({"model": model.eval(), "train_args": {"imgsz": 128, "task": "obb"}}, path)
    return path


@pytest.fixture(scope="module")
def run(checkpoint, tiles, tmp_path_factory):
    """The recipe, the run folder and the store."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / tiles.name).symlink_to(tiles)
    recipe = tiny_recipe(label={"weights": str(checkpoint), "floor": FLOOR, "iou": 0.4, "engine": "pytorch"})
    (store,) = label(recipe, [recipe_label_job(recipe, run_dir / tiles.name)], run_dir)
    return recipe, run_dir, store


def test_the_store_has_what_the_model_finds(checkpoint, run):
    detector = YoloDetector.from_weights(checkpoint, Nms(FLOOR, 0.4, 1000), 128)
    reader, total = TileReader(), 0
    for tile in list(read_all(open_store(run[2])))[:20]:
        (expected,) = detector.detect([reader.read(tile.tile)])
        assert len(tile.found.boxes) == len(expected.boxes)
        np.testing.assert_allclose(tile.found.xywhr[:, :4], expected.xywhr[:, :4], atol=1e-2)
        np.testing.assert_allclose(tile.found.scores, expected.scores, atol=1e-4)
        hulls = np.clip(rotated.hulls(tile.found.xywhr), 0, 128)
        np.testing.assert_allclose(tile.found.boxes, hulls, atol=1e-2)
        total += len(expected.boxes)
    reader.close()
    assert total > 50


def test_layers_have_its_polygons_and_data_sets_too(run, tmp_path):
    store, formats = run[2], ("geoparquet", "yolo-obb", "dota", "coco")
    counts = {fmt: export(store, tmp_path / fmt, fmt, 0.1, "wbf", 0.5) for fmt in formats}
    shapes = []
    for path in (tmp_path / "geoparquet").glob("*.parquet"):
        frame = gpd.read_parquet(path)
        for polygon, angle in zip(frame.geometry, frame["angle"], strict=True):
            one, other = np.diff(np.array(polygon.exterior.coords), axis=0)[:2]
            assert abs(one @ other) < 1e-6 * np.hypot(*one) * np.hypot(*other)  # a right angle
            shapes.append(angle)
    assert len(shapes) == counts["geoparquet"]["boxes"] and np.ptp(shapes) > 0.3
    lines = [line for path in (tmp_path / "dota" / "labelTxt").iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == counts["dota"]["boxes"] and all(len(line.split()) == 10 for line in lines)
    labels = [path.read_text() for path in (tmp_path / "yolo-obb" / "labels").rglob("*.txt")]
    assert sum(len(text.splitlines()) for text in labels) == counts["yolo-obb"]["boxes"] == len(lines)
    assert all(len(line.split()) == 9 for text in labels for line in text.splitlines())
    boxes = json.loads((tmp_path / "coco" / "annotations.json").read_text())["annotations"]
    assert len(boxes) == counts["coco"]["boxes"] == len(lines)


def test_upright_students_and_figures_take_its_hulls(run):
    recipe, run_dir, store = run
    tiles = next(path for path in run_dir.glob("tiles-*"))
    folder = evaluate_store(recipe, "labels", tiles, "test", store, run_dir)
    assert 0 <= numbers(folder)["map50"] <= 1
    targets = soft_targets(tiles, "train_2", store, 0.1)
    assert sum(len(target.boxes) for target in targets) > 0


def test_fusing_keeps_its_angles(run):
    _, run_dir, store = run
    assert fuse_job([store, store], [1, 1], 0.05, 0.55, run_dir)
    fused = fuse([store, store], [1, 1], 0.05, 0.55, run_dir)
    found = [tile.found for tile in read_all(open_store(fused))]
    assert all(one.xywhr is not None for one in found) and sum(len(one.boxes) for one in found) > 50
