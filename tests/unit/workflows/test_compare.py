"""Who teaches whom in a comparison; the runs are in integration."""

import pytest
from conftest import tiny_recipe

from softlabel.errors import RecipeError, TrainingError
from softlabel.labelling.job import LabelJob
from softlabel.training.targets import WEIGHTS
from softlabel.training.ways import ways
from softlabel.workflows import compare


@pytest.fixture
def launched(monkeypatch):
    """The jobs of each launch, which train nothing."""
    launches = []
    monkeypatch.setattr(compare, "train_side_by_side", lambda recipe, jobs, folder: launches.append(jobs) or {})
    return launches


def test_every_seed_has_a_teacher_of_its_own(tiles, tmp_path, launched):
    recipe = tiny_recipe(seed=5, compare={"seeds": 2})
    taught = compare._taught(recipe, tmp_path, tiles)
    (jobs,) = launched
    assert [(job.name, job.seed, job.split) for job in jobs] == [
        ("teacher_2_seed5", 5, "train_2"),
        ("teacher_2_seed6", 6, "train_2"),
        ("teacher_1_seed5", 5, "train_1"),
        ("teacher_1_seed6", 6, "train_1"),
    ]
    keys = [("train_1", 5), ("train_1", 6), ("train_2", 5), ("train_2", 6)]
    for key, job in zip(keys, jobs, strict=True):
        assert taught[key].label.weights == str(job.folder / WEIGHTS)
        assert taught[key].label.splits == (key[0],) and taught[key].seed == recipe.seed
    assert list(taught) == keys and len({job.folder for job in jobs}) == 4


def test_a_teacher_that_is_given_teaches_all_and_labels_once(tiles, weights, tmp_path, monkeypatch, launched):
    labelled = []
    monkeypatch.setattr(compare, "label", lambda recipe, jobs, run_dir: labelled.extend(jobs))
    recipe = tiny_recipe(label={"weights": str(weights)}, compare={"seeds": 3, "splits": ["train_2"]})
    taught = compare._taught(recipe, tmp_path, tiles)
    assert {one.label.weights for one in taught.values()} == {str(weights)} and launched == []
    jobs = compare._label_jobs({"plain": recipe, "low": recipe, "truth": recipe}, taught, tiles)
    stores = compare._label(recipe, tmp_path, jobs)
    assert len(labelled) == 1 and isinstance(labelled[0], LabelJob)
    assert list(stores) == [(name, "train_2", seed) for name in ("plain", "low", "truth") for seed in range(3)]
    assert len(set(stores.values())) == 1


def test_a_way_may_have_its_labels_from_more_views(tiles, weights, tmp_path, launched):
    methods = {"views": {"label.augment": ["fliplr"], "train.threshold": 0.2}}
    recipe = tiny_recipe(label={"weights": str(weights)}, compare={"seeds": 1, "methods": methods})
    taught = compare._taught(recipe, tmp_path, tiles)
    jobs = compare._label_jobs(ways(recipe), taught, tiles)
    assert {name: job.teacher.augment for (name, _, _), job in jobs.items()} == {
        "plain": (),
        "views": ("fliplr",),
        "truth": (),
    }
    assert jobs["views", "train_1", 0].folder(tmp_path) != jobs["plain", "train_1", 0].folder(tmp_path)


def test_views_are_of_the_teacher_alone():
    methods = {"views": {"label.augment": ["fliplr"], "train.soft.rounds": 2}}
    with pytest.raises(RecipeError, match=r"compare\.methods\.views: label\.augment is of the teacher"):
        ways(tiny_recipe(compare={"methods": methods}))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "teacher_1_seed3"),
        ({"compare": {"splits": ["train_1"]}}, "truth_train_1_seed3"),  # nobody is taught by it
        ({"label": {"weights": "teacher.pt"}}, "truth_train_1_seed3"),
        ({"train": {"student": {"model": "yolo26n.yaml"}}}, "truth_train_1_seed3"),
    ],
)
def test_a_student_of_truth_that_taught_the_others_is_not_trained_again(tiles, tmp_path, changes, name):
    recipe = tiny_recipe(**changes)
    job = compare._job(recipe, tmp_path, tiles, "truth", "train_1", 3, tmp_path / "label-none")
    assert job.name == name
    if not changes:
        teachers = compare.teacher_job(
            recipe.model_copy(update={"seed": 3, "train": recipe.train.model_copy(update={"split": "train_2"})}),
            tmp_path,
            tiles,
            "_seed3",
        )
        assert teachers.folder == job.folder


def test_a_teacher_that_cannot_be_trained_ends_the_comparison(tiles, tmp_path, monkeypatch):
    failed = {"teacher_2_seed0": "no boxes"}
    monkeypatch.setattr(compare, "train_side_by_side", lambda recipe, jobs, folder: failed)
    with pytest.raises(TrainingError, match="teacher_2_seed0: no boxes"):
        compare._taught(tiny_recipe(), tmp_path, tiles)
