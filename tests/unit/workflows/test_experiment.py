"""What the experiment asks of labelling, without Ray."""

from types import SimpleNamespace

import pytest
from conftest import tiny_recipe

from softlabel.config import Soft
from softlabel.errors import RecipeError
from softlabel.store import finish
from softlabel.workflows import experiment


def test_teachers_label_in_the_views_of_the_recipe(weights, tiles):
    recipe = tiny_recipe(label={"augment": ["fliplr"]})
    student = SimpleNamespace(job=SimpleNamespace(name="truth"), weights=weights)
    jobs = experiment._label_jobs(recipe, tiles, {1: student, 2: student})
    assert [job.teacher.augment for job in jobs.values()] == [recipe.label.augment] * 2


def test_students_of_rotated_boxes_have_a_teacher_of_such(tmp_path):
    turned, upright = ({"model": name} for name in ("yolo11n-obb.yaml", "yolo11n.yaml"))
    with pytest.raises(
        RecipeError, match=r"yolo11n-obb\.yaml learns rotated boxes, and .* yolo11n\.yaml finds upright"
    ):
        experiment.experiment(tiny_recipe(train={"teacher": upright, "student": turned}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_row_says_whether_its_model_is_judged_by_rotated_boxes(tmp_path):
    keys = ("optimizer", "lr0", "epochs", "epochs_with_mosaic", "best_epoch", "seed", "world_size")
    keys += ("train_tiles", "train_boxes", "val_map50", "seconds")
    finish(tmp_path / "train", {**dict.fromkeys(keys, 1), "losses": {"box": 1.0}})
    job = SimpleNamespace(name="truth_1", split="train_1", threshold=None, model="m", folder=tmp_path / "train")
    student = SimpleNamespace(job=job, teacher=None, source=None)
    measured = dict.fromkeys(("map50", "map50_95", "precision", "recall", "f1", "f1_conf"), 0.5)
    found = {**measured, "losses": {"box": 1.0}, "per_class": {}}
    for rotated in (True, False):
        assert experiment._model_row(tiny_recipe(), student, {**found, "rotated": rotated})["rotated"] is rotated
    assert experiment._model_row(tiny_recipe(), student, found)["rotated"] is False  # of an earlier release


def test_students_learn_plainly_and_by_train_soft(tiles, tmp_path):
    stores = {}
    for number in (1, 2):
        finish(tmp_path / f"label-{number}", {"name": f"teacher_{number}"})
        stores[number] = tmp_path / f"label-{number}"
    train = {**tiny_recipe().train.model_dump(), "thresholds": [0.3]}

    def jobs_of(**soft):
        recipe = tiny_recipe(train={**train, "soft": soft})
        return [student.job for student in experiment.soft_models(recipe, tmp_path, tiles, {"teacher": stores})]

    plain = jobs_of()
    assert [job.name for job in plain] == ["soft_1_at_0.3", "soft_2_at_0.3"]
    both = jobs_of(smoothing=0.5, ignore_truth=True)
    assert [job.name for job in both] == [name for job in plain for name in (job.name, f"{job.name}_softly")]
    assert [job.folder for job in both[::2]] == [job.folder for job in plain]
    assert all(job.soft == Soft(smoothing=0.5) for job in both[1::2])
    assert [job.folder for job in jobs_of(ignore_truth=True)] == [job.folder for job in plain]  # that is about truth
