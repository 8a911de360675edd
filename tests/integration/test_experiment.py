"""The whole chain on a real Ray, small: six models, their table, the report, and a rerun that does nothing."""

import json

import pytest
from conftest import tiny_recipe

from softlabel.labelling import run as labelling
from softlabel.store import summary
from softlabel.training import run as training
from softlabel.workflows import experiment as chain
from softlabel.workflows.experiment import experiment

pytestmark = pytest.mark.usefixtures("ray_session")
LOW, HIGH = 0.00001, 0.0001  # three epochs teach a model next to nothing, so its scores are next to zero


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One experiment of six models of three epochs."""
    run_dir = tmp_path_factory.mktemp("experiment")
    settings = tiny_recipe()
    train = {**settings.train.model_dump(), "thresholds": [LOW, HIGH]}
    recipe = tiny_recipe(train=train, label={"floor": LOW / 2}, execution={"cpus_per_worker": 2})
    return recipe, run_dir, experiment(recipe, run_dir)


def test_six_models_are_compared(finished):
    recipe, run_dir, results = finished
    written = json.loads((run_dir / "results.json").read_text())
    assert written["models"] == json.loads(json.dumps(results["models"]))
    rows = [(row["train_set"], row["labels"], row["threshold"]) for row in written["models"]]
    assert sorted(rows, key=str) == sorted(
        [
            *((f"train_{number}", "truth", None) for number in (1, 2)),
            *((f"train_{number}", "soft", threshold) for number in (1, 2) for threshold in (LOW, HIGH)),
        ],
        key=str,
    )
    for row in written["models"]:
        assert set(row["per_class"]) == set(recipe.classes)
        assert {
            "map50",
            "map50_95",
            "f1",
            "f1_conf",
            "optimizer",
            "epochs_with_mosaic",
            "seed",
            "world_size",
        } <= row.keys()
        for part in ("train", "test", "difference_percent"):
            assert set(row["losses"][part]) == {"box", "cls", "dfl"}


def test_a_student_learns_from_the_other_set_s_teacher_only(finished):
    _, run_dir, results = finished
    for row in results["models"]:
        if row["labels"] == "soft":
            other = {"train_1": "truth_2", "train_2": "truth_1"}[row["train_set"]]
            assert row["teacher"] == other
    labelled = [json.loads(path.read_text()) for path in run_dir.glob("label-truth_?-*/store.json")]
    assert sorted(store["splits"] for store in labelled) == [["test"], ["test"], ["train_1"], ["train_2"]]


def test_drops_compare_with_truth_on_the_same_set(finished):
    models = {row["name"]: row for row in finished[2]["models"]}
    for row in models.values():
        if row["labels"] == "truth":
            assert row["drop"] is None
            continue
        truth = models[f"truth_{row['train_set'][-1]}"]
        drop = row["drop"]["map50"]
        assert drop["absolute"] == pytest.approx(row["map50"] - truth["map50"], abs=1e-9)
        assert drop["low"] <= drop["high"]


def test_labels_are_judged_at_every_threshold(finished):
    _, run_dir, results = finished
    rows = [row for row in results["label_quality"] if row["class"] == "all" and row["train_set"] == "train_1"]
    assert {LOW, HIGH, 0.5} <= {row["threshold"] for row in rows}
    kept = [row["kept"] for row in sorted(rows, key=lambda row: row["threshold"])]
    assert kept == sorted(kept, reverse=True) and kept[0] > 0
    assert all(summary(folder)["rejected"] == 0 for folder in run_dir.glob("label-*"))


def test_the_report_stands_alone(finished):
    page = (finished[1] / "report.html").read_text()
    assert 'src="http' not in page and 'href="http' not in page
    assert all(row["name"] in page for row in finished[2]["models"])


def test_a_rerun_finds_everything_done(finished, monkeypatch):
    recipe, run_dir, results = finished

    def never(*_args, **_kwargs):
        raise AssertionError("finished work was done again")

    monkeypatch.setattr(labelling, "_results", never)
    monkeypatch.setattr(training, "TorchTrainer", never)
    monkeypatch.setattr(chain, "tile", lambda recipe, run_dir: next(run_dir.glob("tiles-*")))
    again = experiment(recipe, run_dir)
    assert again["models"] == results["models"]
    assert again["times_s"] == results["times_s"]
