"""Training on a real Ray Train: ranks that agree, a test split that stays unseen, workers that die."""

import re
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import rasterio
from conftest import CLASSES, tiny_recipe
from made_stores import write_store
from rasterio.windows import Window
from safetensors.numpy import load_file

from softlabel import rotated
from softlabel.config import Soft
from softlabel.detectors.describe import read_header
from softlabel.detectors.tile_loss import mean_losses
from softlabel.detectors.yolo import YoloDetector
from softlabel.errors import RecipeError, TrainingError, WeightsError
from softlabel.imagery.run import tile
from softlabel.imagery.scenes import TileReader
from softlabel.imagery.synthetic import TYPE_IDS, write_scenes
from softlabel.labelling.job import label_job
from softlabel.labelling.run import label
from softlabel.records import EMPTY, Detections, Truth
from softlabel.shards import read_soft_labels
from softlabel.store import summary
from softlabel.tile_table import read_tiles
from softlabel.training.job import train_job, validation_split
from softlabel.training.run import train
from softlabel.training.targets import WEIGHTS, soft_targets, truth_targets

pytestmark = pytest.mark.usefixtures("ray_session")
ALL = ("train_1", "val_1", "train_2")
TWO_WORKERS = {"workers": 2, "cpus_per_worker": 1}
ALL_SOFT = {"class_targets": "vector", "temperature": 0.8, "weight_power": 0.5, "smoothing": 0.3}
ALL_SOFT |= {"background_far": 0.25, "background_doubt": 0.5}


def job_of(recipe, run_dir, tiles, name="truth_1", split="train_1", model="yolov5n.yaml", **kwargs):
    kwargs = {"val_split": "val_1", **kwargs}
    student = recipe.train.student.model_copy(update={"model": model})
    return train_job(recipe, run_dir, name, student, tiles=tiles, split=split, **kwargs)


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """Three models in one launch of two workers, with the test scenes gone: one of ultralytics' on truth, an
    anchor-based one on soft labels with all softness there is, and one of rotated boxes on rotated labels with some."""
    run_dir = tmp_path_factory.mktemp("train")
    recipe = tiny_recipe(execution=TWO_WORKERS)
    tiles = tile(recipe, run_dir)
    (store,) = label(recipe, [label_job(recipe, "teacher", weights, tiles, ["train_2"])], run_dir)
    for row in read_tiles(tiles, ["test"]):
        Path(row["scene_uri"]).unlink(missing_ok=True)
    soft = {"soft_labels": store, "threshold": 0.05, "soft": Soft(ignore_above=0.03, **ALL_SOFT)}
    turned = {"soft_labels": _turned(run_dir, tiles), "soft": Soft(background_far=0.25, smoothing=0.3)}
    jobs = [
        job_of(recipe, run_dir, tiles),
        job_of(recipe, run_dir, tiles, "soft_2", "train_2", "yolov5n-anchor.yaml", **soft),
        job_of(recipe, run_dir, tiles, "turned_2", "train_2", "yolo11n-obb.yaml", **turned),
    ]
    train(recipe, jobs, run_dir)
    return recipe, run_dir, tiles, jobs


def _turned(run_dir, tiles):
    """A store of rotated boxes: those that lie in the truth's, with their corners in the middle of its sides."""
    made = []
    for row in read_tiles(tiles, ["train_2"]):
        truth = Truth.from_row(row["truth"])
        xywhr = rotated.upright(truth.boxes) * np.array([1, 1, 0.7, 0.7, 1], np.float32) + np.array([0, 0, 0, 0, 0.7])
        found = Detections(truth.boxes, np.eye(3, dtype=np.float32)[truth.class_ids], xywhr=xywhr.astype(np.float32))
        made.append((row, found, None, False))
    return write_store(run_dir, made, tiles=tiles.name, weights="turned", splits=["train_2"])


def test_training_never_needs_the_test_split(trained):
    _, _, tiles, jobs = trained
    test_scenes = {row["scene_uri"] for row in read_tiles(tiles, ["test"])}
    assert test_scenes and not any(Path(uri).exists() for uri in test_scenes)
    assert all((job.folder / WEIGHTS).exists() for job in jobs)
    for job in jobs:
        seen = {target.tile["scene_uri"] for target in [*job.targets(), *truth_targets(tiles, job.val_split)]}
        assert not seen & test_scenes


def test_two_ranks_end_with_equal_parameters(trained):
    for job in trained[3]:
        one, two = summary(job.folder)["rank_digests"]
        assert one == two != 0
        assert summary(job.folder)["world_size"] == 2


def test_each_model_says_how_it_was_trained(trained):
    _, _, tiles, jobs = trained
    terms = ({"box", "cls", "dfl"}, {"box", "obj", "cls"}, {"box", "cls", "dfl", "angle"})
    for job, losses in zip(jobs, terms, strict=True):
        said = summary(job.folder)
        assert [row["epoch"] for row in said["history"]] == [1, 2, 3]
        assert (said["epochs"], said["epochs_with_mosaic"], said["optimizer"]) == (3, 2, "SGD")
        assert said["train_tiles"] == len(read_tiles(tiles, [job.split]))
        assert said["best_epoch"] == 1 + int(np.argmax([row["map50"] for row in said["history"]]))
        assert set(said["losses"]) == losses and all(value > 0 for value in said["losses"].values())
        assert all(set(row["losses"]) == losses for row in said["history"])
        assert read_header(job.folder / WEIGHTS).classes == CLASSES
    truth, soft, _ = (summary(job.folder)["train_boxes"] for job in jobs)
    assert truth == sum(len(target.boxes) for target in truth_targets(tiles, "train_1"))
    assert soft == sum(len(target.boxes) for target in soft_targets(tiles, "train_2", jobs[1].soft_labels, 0.05))


def test_the_training_loss_is_that_of_rotated_boxes_where_they_are(trained):
    job = trained[3][2]
    detector, reader = YoloDetector.from_weights(job.folder / WEIGHTS, job.nms), TileReader()
    images = [reader.read(target.tile) for target in job.targets()]
    truths = [Truth(t.boxes, t.class_ids.astype(np.int32), t.class_ids < 0, t.xywhr) for t in job.targets()]
    expected = mean_losses(detector.loss_names(), detector.losses(images, truths))
    reader.close()
    assert summary(job.folder)["losses"] == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def with_collars(weights, tmp_path_factory):
    """Scenes a third of which is nodata, whole tiles of it: labels, and a model on truth and one on these labels."""
    run_dir = tmp_path_factory.mktemp("collars")
    scenes, truth = write_scenes(run_dir / "scenes", tiny_recipe().tiles.synthetic, 0)
    mapping = {number: name for name, number in TYPE_IDS.items()}
    source = {"format": "xview", "path": str(truth), "mapping": mapping}
    recipe = tiny_recipe(tiles={"scenes": str(scenes), "truth": source, "size_px": 128}, execution=TWO_WORKERS)
    for number, scene in enumerate(sorted(scenes.glob("*.tif"))):
        _blacken(scene, columns=256 if number % 3 == 0 else 128)
    tiles = tile(recipe, run_dir)
    (store,) = label(recipe, [label_job(recipe, "teacher", weights, tiles, ["train_2"])], run_dir)
    jobs = [
        job_of(recipe, run_dir, tiles),
        job_of(recipe, run_dir, tiles, "soft_2", "train_2", soft_labels=store, threshold=0.05),
    ]
    train(recipe, jobs, run_dir)
    return tiles, store, jobs


def _blacken(path, columns):
    """The upper half of a scene of 256 px becomes nodata from the left, up to a column."""
    with rasterio.open(path, "r+") as scene:
        scene.nodata = 0
        scene.write(np.zeros((3, 128, columns), np.uint8), window=Window(0, 0, columns, 128))


def _is_black(row):
    """By the window alone, as the fixture wrote it."""
    column, top, *_ = row["window"]
    number = int(re.search(r"\d+", row["scene_id"]).group())
    return top == 0 and (column == 0 or number % 3 == 0)


def test_tiles_without_a_valid_pixel_are_counted_and_learned_from_by_nobody(with_collars):
    tiles, store, (truth, soft) = with_collars
    empty = {split: {r["tile_id"] for r in read_tiles(tiles, [split]) if _is_black(r)} for split in ALL}
    assert all(empty.values()) and 0.3 < sum(map(len, empty.values())) / len(read_tiles(tiles, ALL)) < 0.37
    counts = summary(store)
    assert counts["empty"] == len(empty["train_2"]) and counts["rejected"] == 0
    assert counts["requested"] == counts["labelled"] + counts["empty"] == len(read_tiles(tiles, ["train_2"]))
    assert {row["tile_id"] for row in read_soft_labels(store) if row["status"] == EMPTY} == empty["train_2"]
    for job, split, val_split in ((truth, "train_1", "val_1"), (soft, "train_2", "val_1")):
        said = summary(job.folder)
        assert said["empty_tiles"] == {split: len(empty[split]), val_split: len(empty[val_split])}
        assert said["train_tiles"] == len(read_tiles(tiles, [split])) - len(empty[split])


def test_a_model_that_is_done_is_not_trained_again(trained):
    recipe, run_dir, _, jobs = trained
    before = [(job.folder / WEIGHTS).stat().st_mtime_ns for job in jobs]
    started = time.monotonic()
    train(recipe, jobs, run_dir)
    assert time.monotonic() - started < 5
    assert [(job.folder / WEIGHTS).stat().st_mtime_ns for job in jobs] == before


def test_a_killed_worker_goes_on_from_its_last_epoch(tmp_path):
    """Of two equal models in one launch, the worker is killed in the second.

    They are end to end, whose two heads share the loss by the epoch, and learn with all softness there is.
    """
    recipe = tiny_recipe(execution={"cpus_per_worker": 2})
    tiles = tile(recipe, tmp_path)
    learns = {"model": "yolo26n.yaml", "split": "train_2", "soft_labels": _unsure(tmp_path, tiles), "threshold": 0.5}
    learns["soft"] = Soft(ignore_above=0.3, **ALL_SOFT)
    undisturbed, disturbed = (
        job_of(recipe, tmp_path / name, tiles, name, **learns) for name in ("undisturbed", "disturbed")
    )
    killed: list[int] = []
    killer = threading.Thread(target=_kill_worker_after_an_epoch, args=(disturbed.folder, killed))
    killer.start()
    train(recipe, [undisturbed, disturbed], tmp_path)
    killer.join()
    assert killed
    one, other = (summary(job.folder)["history"] for job in (undisturbed, disturbed))
    assert [row["epoch"] for row in other] == [1, 2, 3]
    for before, after in zip(one, other, strict=True):
        # Another order of the tiles moves these by a hundredth.
        assert after["losses"] == pytest.approx(before["losses"], rel=1e-4), before["epoch"]
    assert not list(tmp_path.rglob("state.pt"))
    one, other = (load_file(job.folder / WEIGHTS) for job in (undisturbed, disturbed))
    for key, value in one.items():
        np.testing.assert_allclose(other[key], value, atol=1e-4, err_msg=key)


def _unsure(run_dir, tiles):
    """A store of the truth's boxes, with scores from 0.1 to 1."""
    made, generator = [], np.random.default_rng(0)
    for row in read_tiles(tiles, ["train_2"]):
        truth = Truth.from_row(row["truth"])
        scores = np.eye(3, dtype=np.float32)[truth.class_ids] * generator.uniform(0.1, 1, (len(truth.boxes), 1))
        order = np.argsort(-scores.max(axis=1, initial=0), kind="stable")
        made.append((row, Detections(truth.boxes, scores.astype(np.float32)).at(order), None, False))
    return write_store(run_dir, made, tiles=tiles.name, weights="unsure", splits=["train_2"])


def _kill_worker_after_an_epoch(folder, killed):
    """Kill -9 the training worker once the state after its first epoch lies in the model's folder."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (folder / "state.pt").exists():
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
            return
        time.sleep(0.05)


def test_nothing_above_the_threshold_is_one_clear_error(trained):
    recipe, run_dir, tiles, jobs = trained
    job = job_of(recipe, run_dir, tiles, "none", "train_2", soft_labels=jobs[1].soft_labels, threshold=1.0)
    with pytest.raises(TrainingError, match=r"nothing to train on: no soft label of .* is above 1"):
        train(recipe, [job], run_dir)


def test_unknown_splits_and_weights_are_named(trained):
    recipe, run_dir, tiles, _ = trained
    with pytest.raises(TrainingError, match=r"split nowhere of .* has no truth"):
        train(recipe, [job_of(recipe, run_dir, tiles, split="nowhere")], run_dir)
    missing = recipe.train.student.model_copy(update={"weights": "gone.safetensors"})
    with pytest.raises(WeightsError, match=r"no weights at .*gone\.safetensors"):
        train_job(recipe, run_dir, "x", missing, tiles=tiles, split="train_1", val_split="val_1")


def test_a_soft_student_chooses_on_its_teacher_s_validation_split(trained):
    tiles = trained[2]
    assert validation_split(tiles, "train_1", "truth") == "val_1"
    assert validation_split(tiles, "train_1", "soft") == "val_2"
    assert validation_split(tiles, "train_2", "soft") == "val_1"


def test_no_validation_split_is_named(tmp_path):
    recipe = tiny_recipe(tiles={**tiny_recipe().tiles.model_dump(), "split": {"validation": 0}})
    with pytest.raises(RecipeError, match="no validation split"):
        validation_split(tile(recipe, tmp_path), "train_1", "truth")
