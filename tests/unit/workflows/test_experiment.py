"""What the experiment asks of labelling, without Ray."""

from types import SimpleNamespace

from conftest import tiny_recipe

from softlabel.workflows import experiment


def test_teachers_label_in_the_views_of_the_recipe(weights, tiles):
    recipe = tiny_recipe(label={"augment": ["fliplr"]})
    student = SimpleNamespace(job=SimpleNamespace(name="truth"), weights=weights)
    jobs = experiment._label_jobs(recipe, tiles, {1: student, 2: student})
    assert [job.teacher.augment for job in jobs.values()] == [recipe.label.augment] * 2
