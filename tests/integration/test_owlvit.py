"""An open-vocabulary teacher on a real Ray: the same store, rerun and filter as a YOLO's."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import CLASSES, tiny_recipe
from drivers import by_tile
from tiny_owlvit import SIDE

from softlabel.detectors.owlvit import OwlVitDetector
from softlabel.detectors.queries import Queries
from softlabel.errors import RecipeError, WeightsError
from softlabel.evaluation.run import evaluate_store, numbers
from softlabel.imagery.run import tile
from softlabel.imagery.scenes import read_tile
from softlabel.imagery.synthetic import TYPE_IDS
from softlabel.labelling import run as labelling
from softlabel.labelling.job import label_job, open_vocabulary_job, recipe_label_job
from softlabel.labelling.run import label
from softlabel.records import Nms, detections_from_row
from softlabel.results.stores import open_store
from softlabel.store import summary
from softlabel.tile_table import read_tiles
from softlabel.training.job import train_job
from softlabel.training.run import train
from softlabel.training.targets import WEIGHTS
from softlabel.workflows.categorize import categorize

pytestmark = pytest.mark.usefixtures("ray_session")
PROMPTS = {"car": ["a car", "cars"], "plane": ["a plane"], "ship": ["a ship", "boats", "a vessel"]}


@pytest.fixture(scope="module")
def model():
    """Of toy size and really trained, by benchmarks/tiny_owlvit.py on made-up scenes of another seed."""
    return Path(__file__).parents[1] / "assets" / "tiny-owlvit"


def worded(model, **owlvit):
    return tiny_recipe(label={"open_vocabulary": {"model": str(model), "prompts": PROMPTS, **owlvit}, "floor": 0.3})


@pytest.fixture(scope="module")
def categorized(model, tmp_path_factory):
    """A vocabulary over scenes that the model has not seen."""
    run_dir = tmp_path_factory.mktemp("categorized")
    vocabulary = run_dir / "words.txt"
    vocabulary.write_text("plane: a plane, an aircraft\nship\nbridge\ncar\n")
    scenes = {"num_scenes": 12, "scene_size_px": 224, "difficulty": 0.1}
    # With an overlap every object lies whole in some tile: without, what a seam cuts counts as two.
    tiles = {"synthetic": scenes, "size_px": SIDE, "overlap_px": 64}
    recipe = tiny_recipe(seed=1, label={"open_vocabulary": {"model": str(model)}, "iou": 0.3}, tiles=tiles)
    return categorize(recipe, run_dir, vocabulary, 0.5), run_dir, recipe, vocabulary


def test_words_label_every_tile_with_class_vectors(categorized, model):
    store = open_store(next(categorized[1].glob("label-vocabulary-*")))
    rows, counts = by_tile(store.folder), summary(store.folder)
    assert counts["requested"] == counts["labelled"] == len(rows) > 0
    prompts = (("a plane", "an aircraft"), ("ship",), ("bridge",), ("car",))
    detector = OwlVitDetector(model, Queries(prompts), Nms(0.01, 0.3))
    for asked in read_tiles(store.tiles)[::7]:
        (alone,) = detector.detect([read_tile(asked)])
        found = detections_from_row(rows[asked["tile_id"]])
        assert found.scores.shape[1:] == (4,) and (found.best > 0.01).all()
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=0.01)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-4)


def test_other_words_are_another_teacher(model, tiles, tmp_path):
    folder = recipe_label_job(worded(model), tiles).folder(tmp_path)
    assert recipe_label_job(worded(model), tiles).folder(tmp_path) == folder
    for other in ({"combine": "max"}, {"background": ["water"]}, {"prompts": {**PROMPTS, "car": ["a car"]}}):
        assert recipe_label_job(worded(model, **other), tiles).folder(tmp_path) != folder


@pytest.mark.parametrize(
    ("owlvit", "label", "message"),
    [
        ({"prompts": {"car": ["a car"], "plane": ["a plane"]}}, {}, "give ship prompts, or examples"),
        ({"prompts": {**PROMPTS, "tank": ["a tank"]}}, {}, "names tank, which `classes` does not"),
        ({"prompts": {**PROMPTS, "car": []}, "examples": {"car": ["no.png"]}}, {}, r"cannot read no\.png as an image"),
        ({"examples": {"car": ["no.png"]}}, {}, r"give car prompts, or examples \(one of the two\)"),
        ({}, {"weights": "yolo.safetensors"}, r"label\.weights is not set, nor label\.open_vocabulary \(or both are\)"),
        ({}, {"imgsz": 320}, "an open-vocabulary model sees every tile at the size of its own configuration"),
        ({}, {"engine": "openvino"}, "openvino does not run this model \\(owlvit\\): set it to pytorch or auto"),
    ],
)
def test_what_cannot_label_is_refused_in_one_line(model, tiles, owlvit, label, message):
    recipe = worded(model, **owlvit)
    recipe = recipe.model_copy(update={"label": recipe.label.model_copy(update=label)})
    with pytest.raises(RecipeError, match=message):
        recipe_label_job(recipe, tiles)


def test_a_missing_model_is_one_line(tiles, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="nobody/nothing is no folder here, and the hub gave no such model"):
        recipe_label_job(worded("nobody/nothing"), tiles)


def test_categorize_counts_every_class_and_scores_itself_against_truth(categorized):
    results, run_dir, _, _ = categorized
    assert {row["class"] for row in results["classes"]} == {"plane", "ship", "bridge", "car"}
    assert results["scenes"] == 12 and sum(row["objects"] for row in results["classes"]) > 0
    assert next(row for row in results["classes"] if row["class"] == "bridge")["objects"] <= 2  # there is none
    scenes = pq.read_table(run_dir / "scenes.parquet").to_pylist()
    for row in results["classes"]:
        counts = [one["count"] for one in scenes if one["class"] == row["class"]]
        assert (len(counts), sum(counts)) == (row["scenes"], row["objects"])
    assert [row["class"] for row in results["truth"]] == list(CLASSES)
    drawn = {name: 0 for name in CLASSES}
    for feature in json.loads(next(run_dir.rglob("truth.geojson")).read_text())["features"]:
        drawn[{value: key for key, value in TYPE_IDS.items()}[feature["properties"]["type_id"]]] += 1
    for row in results["truth"]:
        assert row["truth"] == pytest.approx(drawn[row["class"]], abs=2)
        assert row["presence_precision"] > 0.6 and row["presence_recall"] > 0.6, row


def test_categorize_writes_a_page_and_a_draft(categorized):
    results, run_dir, _, _ = categorized
    page = (run_dir / "categories.html").read_text()
    found = [row["class"] for row in results["classes"] if row["objects"]]
    assert page.count("data:image/jpeg;base64,") == len(found) > 0
    draft = yaml.safe_load((run_dir / "classes.yaml").read_text())
    assert draft["classes"] == found and set(draft["label"]["open_vocabulary"]["prompts"]) == set(found)


@pytest.mark.long
def test_words_teach_a_student(model, tmp_path):
    """From words alone to a YOLO that finds objects in scenes that neither has seen."""
    args = {
        **{"epochs": 30, "imgsz": SIDE, "batch": 16, "nbs": 16, "optimizer": "AdamW", "lr0": 0.002, "cache": "ram"},
        **{"warmup_epochs": 1, "mosaic": 0.0, "scale": 0.2},
    }
    student = {"model": "yolov5n.yaml", "args": args}
    recipe = tiny_recipe(
        seed=1,
        tiles={"synthetic": {"num_scenes": 60, "scene_size_px": 384, "difficulty": 0.1}, "size_px": SIDE},
        label={"open_vocabulary": {"model": str(model), "prompts": PROMPTS}},
        train={"teacher": student, "student": student, "thresholds": [0.25]},
        execution={"cpus_per_worker": 2},
    )
    tiles = tile(recipe, tmp_path)
    (store,) = label(recipe, [open_vocabulary_job(recipe, "words", tiles, ["train_1", "val_1"])], tmp_path)
    job = train_job(
        recipe, tmp_path, "student", recipe.train.student, tiles=tiles, split="train_1", val_split="val_1",
        soft_labels=store, threshold=0.25,
    )  # fmt: skip
    train(recipe, [job], tmp_path)
    (found,) = label(recipe, [label_job(recipe, "student", job.folder / WEIGHTS, tiles, ["test"])], tmp_path)
    assert numbers(evaluate_store(recipe, "student", tiles, "test", found, tmp_path))["map50"] > 0.3


def test_categorizing_again_labels_nothing_again(categorized, monkeypatch):
    results, run_dir, recipe, vocabulary = categorized
    monkeypatch.setattr(labelling, "_results", None)
    assert categorize(recipe, run_dir, vocabulary, 0.5)["classes"] == results["classes"]
    with pytest.raises(RecipeError, match=r"label\.open_vocabulary is not set"):
        categorize(tiny_recipe(), run_dir, vocabulary, 0.5)
