"""A model of rotated boxes labels: its angles are in the store, in what is made of it, and nowhere where hulls do.
Students learn them."""

import json
from dataclasses import replace

import cv2
import geopandas as gpd
import numpy as np
import pytest
import torch
from conftest import CLASSES, tiny_recipe
from ultralytics.nn.tasks import OBBModel

from softlabel import rotated
from softlabel.detectors.describe import read_header
from softlabel.detectors.yolo import YoloDetector
from softlabel.evaluation.matching import to_columns
from softlabel.evaluation.metrics import evaluate
from softlabel.evaluation.run import evaluate_store, numbers, tile_results
from softlabel.imagery import run as imagery
from softlabel.imagery.scenes import TileReader
from softlabel.labelling.job import label_job, recipe_label_job
from softlabel.labelling.run import label
from softlabel.records import Nms
from softlabel.results.fuse import fuse_job
from softlabel.results.run import export, fuse
from softlabel.results.stores import open_store, read_all
from softlabel.store import summary
from softlabel.training.job import train_job
from softlabel.training.run import train
from softlabel.training.targets import WEIGHTS, soft_targets

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
        # Other batches round otherwise; of this model's boxes some are four times as large as their tile.
        np.testing.assert_allclose(tile.found.xywhr[:, :4], expected.xywhr[:, :4], atol=1e-2, rtol=1e-4)
        np.testing.assert_allclose(tile.found.scores, expected.scores, atol=1e-3)
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two models of rotated boxes on scenes of turned rectangles: one on truth in DOTA's form, one on the soft labels
    of the first."""
    root = tmp_path_factory.mktemp("turned")
    write_turned(root, np.random.default_rng(0), 24)
    truth = {"format": "dota", "path": str(root / "labelTxt")}
    model = {"model": "yolo11n-obb.yaml", "args": {"epochs": 2, "imgsz": 64, "batch": 8, "cache": "ram", "angle": 2.0}}
    recipe = tiny_recipe(
        tiles={"scenes": str(root / "scenes"), "truth": truth, "size_px": 128},
        train={"teacher": model, "student": model},
        classes=["ship"],
        execution={"workers": 2, "cpus_per_worker": 1},
    )
    run_dir = root / "run"
    tiles = imagery.tile(recipe, run_dir)
    common = {"model": recipe.train.student, "tiles": tiles}
    on_truth = train_job(recipe, run_dir, "truth_1", split="train_1", val_split="val_1", **common)
    train(recipe, [on_truth], run_dir)
    jobs = [
        label_job(recipe, "truth_1", on_truth.folder / WEIGHTS, tiles, ["train_2"]),
        label_job(recipe, "truth_1", on_truth.folder / WEIGHTS, tiles, ["test"], with_losses=True),
    ]
    store, test_store = label(recipe, jobs, run_dir)
    asked = {"split": "train_2", "val_split": "val_1", "soft_labels": store, "threshold": FLOOR / 10}
    on_labels = train_job(recipe, run_dir, "soft_2", **asked, **common)
    train(recipe, [on_labels], run_dir)
    return recipe, run_dir, tiles, [on_truth, on_labels], test_store


def write_turned(root, rng, count):
    """Grey scenes of 128 px with bright rectangles, turned by any angle, and their corners as DOTA has them."""
    for folder in ("scenes", "labelTxt"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        image = rng.normal(90, 12, (128, 128, 3))
        centres = np.array([[32, 32], [96, 32], [32, 96], [96, 96]]) + rng.uniform(-8, 8, (4, 2))
        boxes = np.column_stack([centres, rng.uniform(30, 44, 4), rng.uniform(8, 14, 4), rng.uniform(0, np.pi, 4)])
        corners = rotated.corners(boxes)
        for one in corners:
            cv2.fillPoly(image, [np.round(one).astype(np.int32)], (220, 210, 190))
        cv2.imwrite(str(root / "scenes" / f"P{i:04}.png"), np.clip(image, 0, 255).astype(np.uint8))
        lines = [" ".join(f"{value:.2f}" for value in one.ravel()) + " ship 0" for one in corners]
        (root / "labelTxt" / f"P{i:04}.txt").write_text("\n".join(lines))


@pytest.mark.long
def test_students_learn_angles_from_truth_and_from_soft_labels(trained):
    _, _, _, jobs, _ = trained
    for job in jobs:
        said = summary(job.folder)
        assert all(row["losses"].keys() == {"box", "cls", "dfl", "angle"} for row in said["history"])
        assert all(value > 0 for row in said["history"] for value in row["losses"].values())
        assert said["losses"].keys() == {"box", "cls", "dfl", "angle"} and said["losses"]["angle"] > 0
        assert read_header(job.folder / WEIGHTS).train_args["angle"] == 2.0
    for target in jobs[1].targets():
        assert target.xywhr.shape == (len(target.boxes), 5)


@pytest.mark.long
def test_they_are_judged_by_rotated_iou(trained):
    recipe, run_dir, tiles, _, store = trained
    found = numbers(evaluate_store(recipe, "truth_1", tiles, "test", store, run_dir))
    assert found["losses"].keys() == {"box", "cls", "dfl", "angle"}
    results = list(tile_results(tiles, "test", store).values())
    assert found["map50_95"] == pytest.approx(evaluate(results, recipe.classes).map50_95)
    upright = [replace(one, detections=replace(one.detections, xywhr=None)) for one in results]
    columns, hulls = to_columns(results, 1), to_columns(upright, 1)
    assert columns.boxes.shape == (len(hulls.boxes), 5) and columns.truth_boxes.shape == (len(hulls.truth_boxes), 5)


@pytest.mark.long
def test_a_trained_one_starts_another(trained):
    recipe, run_dir, tiles, (on_truth, _), _ = trained
    model = recipe.train.student.model_copy(update={"weights": str(on_truth.folder / WEIGHTS)})
    job = train_job(recipe, run_dir, "more", model, tiles=tiles, split="train_2", val_split="val_1")
    train(recipe, [job], run_dir)
    assert summary(job.folder)["epochs"] == 2
