"""What the experiment asks of labelling, without Ray."""

from types import SimpleNamespace

import pytest
from conftest import tiny_recipe

from softlabel.errors import RecipeError
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
