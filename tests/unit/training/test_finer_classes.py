"""Students of labels whose classes are finer than the recipe's: what they learn, and what they are validated on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from lone_training import LoneTraining
from made_stores import CLASSES, write_finer, write_store

from softlabel.cli import main
from softlabel.detectors.header import read_safetensors_header
from softlabel.detectors.teachers import weights_teacher
from softlabel.detectors.yolo import YoloDetector
from softlabel.dry_run import plan
from softlabel.errors import RecipeError, StoreError
from softlabel.imagery.scenes import read_tile
from softlabel.recipe_file import dump_recipe
from softlabel.records import Detections, Nms, Truth
from softlabel.results.chosen import chosen_labels
from softlabel.results.colour import Colour
from softlabel.results.subtype import subtype_job
from softlabel.store import DONE, STORE, read_json, write_json
from softlabel.tile_table import read_tiles
from softlabel.training import trainer as training
from softlabel.training.arguments import check_soft
from softlabel.training.job import recipe_train_job, train_job
from softlabel.training.targets import WEIGHTS

FINER = [f"car-{name}" for name in Colour.names]


def labelled(row, score=0.6):
    """Truth as a teacher would find it who is never wrong."""
    truth = Truth.from_row(row["truth"])
    scores = np.full((len(truth.boxes), 3), 0.05, np.float32)
    scores[np.arange(len(scores)), truth.class_ids] = score
    return row, Detections(truth.boxes, scores), None, False


@pytest.fixture(scope="module")
def made(tiles):
    """A store of the tiny recipe's classes."""
    return write_store(tiles.parent, [labelled(row) for row in read_tiles(tiles)], tiles=tiles.name, weights="sure")


@pytest.fixture(scope="module")
def finer(made):
    """The same with cars by their colour."""
    job = subtype_job(made, "car", Colour())
    write_finer(job, read_tile)
    return job.output


def recipe_of(store, **train):
    settings = tiny_recipe().train.model_dump(mode="json")
    return tiny_recipe(train={**settings, "store": str(store), **train})


def job_of(recipe, run_dir, tiles):
    chosen = chosen_labels(recipe)
    return recipe_train_job(recipe, run_dir, tiles, chosen.of(tiles), chosen.class_map)


def test_a_student_learns_the_boxes_of_the_coarse_store_by_finer_names(made, finer, tiles, tmp_path):
    job, coarse = (job_of(recipe_of(store), tmp_path, tiles) for store in (finer, made))
    assert job.classes == (*FINER, "plane", "ship") and coarse.classes == tuple(CLASSES) and coarse.class_map is None
    assert job.folder != coarse.folder
    parents = [CLASSES.index(dict(job.class_map.becomes)[name]) for name in job.classes]
    seen = set()
    for target, other in zip(job.targets(), coarse.targets(), strict=True):
        np.testing.assert_array_equal(target.boxes, other.boxes)
        assert [parents[k] for k in target.class_ids] == other.class_ids.tolist()
        seen |= {job.classes[k] for k in target.class_ids}
    assert {"plane", "ship"} < seen and len(seen) > 3  # cars of more than one colour


def test_a_store_of_the_recipe_s_classes_is_the_one_that_is_found_by_itself(made, tiles, tmp_path):
    recipe = recipe_of(made)
    plain = tiny_recipe()
    by_itself = train_job(
        plain, tmp_path, "student", plain.train.student, tiles=tiles, split="train_2", val_split="val_1",
        soft_labels=made, threshold=plain.train.threshold,
    )  # fmt: skip
    assert job_of(recipe, tmp_path, tiles) == by_itself


def test_a_threshold_per_class_is_that_of_a_finer_one_s_class(finer, tiles, tmp_path):
    job = job_of(recipe_of(finer, threshold={"car": 0.9, "plane": 0.3, "ship": 0.3}), tmp_path, tiles)
    assert {job.classes[k] for target in job.targets() for k in target.class_ids} == {"plane", "ship"}
    assert job._per_class(job.threshold).tolist() == pytest.approx([0.9] * len(FINER) + [0.3, 0.3])


def test_one_class_may_become_several_for_the_loss(finer):
    recipe = recipe_of(finer, soft={"smoothing": 0.5}).model_copy(update={"classes": ("car",)})
    with pytest.raises(RecipeError, match="with one class there is no other"):
        check_soft(recipe, [0.3])
    check_soft(recipe, [0.3], len(FINER))


def test_it_is_validated_by_the_best_of_each_class_s_finer_scores(finer, tiles, tmp_path, monkeypatch):
    """One epoch of the real loop; what the trainer's own validation sees is what the mapping by hand gives."""
    job = job_of(recipe_of(finer), tmp_path, tiles)
    job = replace(job, args={**job.args, "epochs": 1}, nms=Nms(0.0001, 0.7, 50))
    LoneTraining(tiles, tmp_path, torch.device("cpu"), monkeypatch)
    judged = []
    plainly = training.evaluate
    monkeypatch.setattr(
        training, "evaluate", lambda results, classes: judged.append((results, classes)) or plainly(results, classes)
    )
    trainer = training.train_model(job, 1)
    ((results, classes),) = judged
    assert classes == tuple(CLASSES) and trainer.summary()["train_boxes"] > 0
    found = [one.detections for one in results if len(one.detections.boxes)]
    assert found and all(one.scores.shape[1] == 3 for one in found)
    assert read_safetensors_header(job.folder / WEIGHTS).classes == (*FINER, "plane", "ship")
    losses = training.training_losses(job, trainer.targets[:2])
    assert losses and all(np.isfinite(value) for value in losses.values())
    as_it_is = tiny_recipe(label={"engine": "pytorch", "classes": dict.fromkeys(FINER, "car")})
    teacher = weights_teacher(as_it_is, job.folder / WEIGHTS, as_it_is.label.classes)
    assert teacher.fingerprint["classes"] == CLASSES
    assert teacher.class_map.columns == (tuple(range(len(FINER))), (len(FINER),), (len(FINER) + 1,))
    detector = YoloDetector.from_weights(job.folder / WEIGHTS, Nms(0.0001, 0.7, 50))
    detector.map_classes(teacher.class_map.columns)
    row = read_tiles(tiles, ["val_1"])[0]
    (found,) = detector.detect([read_tile(row)])
    assert len(found.boxes) and found.scores.shape[1] == 3


# --- mistakes ---


def refused(recipe, problem):
    with pytest.raises(RecipeError, match=problem) as caught:
        chosen_labels(recipe)
    assert "\n" not in str(caught.value)


def test_labels_that_do_not_fit_the_recipe_are_refused(made, finer, tiles, tmp_path):
    refused(recipe_of(finer, labels="truth"), r"train\.store is labels to learn from, and train\.labels is truth")
    refused(recipe_of(finer, calibration="c.json"), r"train\.calibration is of the recipe's classes")
    others = recipe_of(finer).model_copy(update={"classes": ("plane", "ship")})
    refused(others, r"has car-white, .*, neither among the recipe's classes \(plane, ship\) nor finer ones")
    more = recipe_of(finer).model_copy(update={"classes": (*CLASSES, "bus")})
    refused(more, r"has nothing for bus: remove it from `classes`")
    part = write_store(
        tiles.parent,
        [labelled(row) for row in read_tiles(tiles)],
        tiles=tiles.name,
        weights="part",
        splits=["train_1"],
    )
    refused(recipe_of(part), r"has labels of train_1, and train\.split is train_2: set it to one of these")
    with pytest.raises(RecipeError, match=r"is of tiles-.*, the recipe's tiles are tiles-other: give the classes"):
        chosen_labels(recipe_of(made)).of(tmp_path / "tiles-other")
    with pytest.raises(StoreError, match="is no store of soft labels: give a label-"):
        chosen_labels(recipe_of(tmp_path))
    assert chosen_labels(tiny_recipe()) is None


def test_a_dry_run_says_which_labels_and_finds_mistakes(finer, tmp_path):
    lines = list(plan(recipe_of(finer), trains=True, labels=False))
    assert f"labels: {finer}, with the classes {', '.join((*FINER, 'plane', 'ship'))}" in lines
    assert not any(line.startswith("labels:") for line in plan(recipe_of("later"), trains=True, labels=False))
    with pytest.raises(RecipeError, match="remove one of them"):
        list(plan(recipe_of(finer, labels="truth"), trains=True, labels=False))


@pytest.mark.parametrize("verb", ["experiment", "search", "compare", "demo"])
def test_steps_that_label_by_themselves_refuse_it(verb, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main([verb, "--config", "demo", "--set", "train.store=x", "--dry-run"]) == 2
    assert f"train.store is for `softlabel train` alone, and {verb} labels by itself" in capsys.readouterr().err


def test_a_store_without_parents_has_none(made, tmp_path):
    """As every store before had none."""
    assert "parents" not in read_json(made / STORE)
    found = json.loads((made / STORE).read_text())
    found["teacher"]["classes"] = ["car-red", "plane", "ship"]
    copy = made.with_name("label-copy")
    write_json(copy / STORE, found)
    write_json(copy / DONE, read_json(made / DONE))
    refused(recipe_of(copy), r"has car-red, neither among the recipe's classes")


@pytest.mark.parametrize(("key", "value"), [("supplement", {}), ("rounds", 2)])
def test_what_is_of_the_recipe_s_classes_is_refused(finer, tiles, key, value):
    with pytest.raises(RecipeError, match=rf"train\.soft\.{key} is of the recipe's classes"):
        job_of(recipe_of(finer, soft={key: value}), tiles.parent, tiles)


def test_a_dry_run_counts_the_classes_that_a_student_would_have(tiles, tmp_path, capsys):
    """Online smoothing is of no use with one class, and of some where the store has several of it."""
    rows = [
        (row, Detections(found.boxes, found.scores[:, :1]), *more)
        for row, found, *more in map(labelled, read_tiles(tiles))
    ]
    store = write_store(tiles.parent, rows, tiles=tiles.name, weights="cars", classes=["car"])
    job = subtype_job(store, "car", Colour())
    write_finer(job, read_tile)
    for chosen, code in ((job.output, 0), (store, 2)):
        recipe = recipe_of(chosen, soft={"smoothing": 0.5}).model_copy(update={"classes": ("car",)})
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        asked = ["train", "--config", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "run"), "--dry-run"]
        assert main(asked) == code
        assert ("smoothing has no use" in capsys.readouterr().err) == bool(code)
