"""What may be varied, as Optuna, a grid and the curve see it."""

import numpy as np
import pytest
from conftest import tiny_recipe
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from softlabel.config import Search, Soft
from softlabel.errors import RecipeError
from softlabel.recipe_file import with_values
from softlabel.search.run import Inputs, check_space
from softlabel.search.space import distributions, first_points, grid, rounded, to_unit

SPACE = Search.model_validate(
    {
        "space": {
            "train.threshold": {"min": 0, "max": 1},
            "train.student.args.epochs": {"min": 2, "max": 6},
            "train.student.args.imgsz": {"choices": [64, 96]},
        }
    }
).space


def test_thresholds_are_real_and_epochs_whole_numbers():
    assert distributions(SPACE) == {
        "train.threshold": FloatDistribution(0, 1),
        "train.student.args.epochs": IntDistribution(2, 6),
        "train.student.args.imgsz": CategoricalDistribution([64, 96]),
    }


def test_what_is_made_of_unsure_labels_may_vary():
    space = {
        "train.soft.weight_power": {"min": 0, "max": 2},
        "train.soft.class_targets": {"choices": ["hard", "vector"]},
    }
    recipe = tiny_recipe(search={"space": space})
    check_space(recipe)
    assert distributions(recipe.search.space)["train.soft.weight_power"] == FloatDistribution(0, 2)
    found = with_values(recipe, {"train.soft.weight_power": 0.5, "train.soft.class_targets": "vector"})
    assert found.train.soft == Soft(weight_power=0.5, class_targets="vector")


@pytest.mark.parametrize(
    ("space", "problem"),
    [
        (
            {"train.threshold": {"min": 0.05, "max": 0.9}, "train.soft.ignore_above": {"min": 0.01, "max": 0.1}},
            "is 0.1 for",
        ),
        (
            {"train.threshold": {"min": 0.2, "max": 0.9}, "train.soft.ignore_above": {"choices": [0.1, 0.3]}},
            "is 0.3 for",
        ),
        ({"train.soft.temperature": {"min": 0.5, "max": 1}}, "temperature is of class vectors"),
        ({"train.soft.nonsense": {"min": 0.5, "max": 1}}, "unknown key"),
        ({"train.split": {"choices": ["train_1"]}}, "it may vary train.threshold, and keys below train.student"),
    ],
)
def test_a_space_whose_values_make_no_student_is_refused(space, problem):
    with pytest.raises((RecipeError, ValueError), match=problem):
        check_space(tiny_recipe(search={"space": space}))


def test_a_search_with_train_soft_is_another_one(tmp_path):
    plain, soft = (
        tiny_recipe(train={**tiny_recipe().train.model_dump(), "soft": values}) for values in ({}, {"smoothing": 0.5})
    )
    folders = [Inputs(one, tmp_path, tmp_path, tmp_path, "val_1", {}).folder for one in (plain, soft, tiny_recipe())]
    assert folders[0] == folders[2] != folders[1]


def test_a_grid_has_every_combination():
    found = grid(SPACE, 3)
    assert len(found) == 3 * 3 * 2 and len({tuple(point.values()) for point in found}) == 18
    assert [point["train.threshold"] for point in found[::6]] == [0, 0.5, 1]
    assert {point["train.student.args.epochs"] for point in found} == {2, 4, 6}


def test_points_lie_in_the_unit_cube_and_choices_equally_far_apart():
    points = [
        {"train.threshold": 0.25, "train.student.args.epochs": 6, "train.student.args.imgsz": 64},
        {"train.threshold": 1.0, "train.student.args.epochs": 2, "train.student.args.imgsz": 96},
    ]
    np.testing.assert_allclose(to_unit(SPACE, points), [[0.25, 1, 0.5, 0], [1, 0, 0, 0.5]])


def test_the_first_points_are_the_papers_and_the_teachers_within_the_space():
    recipe = tiny_recipe(search={"space": {"train.threshold": {"min": 0.2, "max": 0.45}}})
    assert first_points(recipe, [0.4123]) == [{"train.threshold": 0.3}, {"train.threshold": 0.412}]
    per_class = tiny_recipe(
        search={
            "space": {"train.threshold.car": {"min": 0, "max": 1}, "train.student.args.imgsz": {"choices": [64, 96]}}
        }
    )
    assert first_points(per_class, []) == [
        {"train.threshold.car": 0.3, "train.student.args.imgsz": 64},
        {"train.threshold.car": 0.5, "train.student.args.imgsz": 64},
    ]


def test_the_first_points_take_what_the_recipe_leaves_open_from_the_middle():
    space = {
        "train.threshold": {"min": 0.05, "max": 0.95},
        "train.student.args.lr0": {"min": 0.001, "max": 0.003},
        "train.student.args.epochs": {"choices": [5, 7, 9]},
    }
    others = {"train.student.args.lr0": 0.002, "train.student.args.epochs": 7}
    found = first_points(tiny_recipe(search={"space": space}), [])
    assert found == [{"train.threshold": 0.3, **others}, {"train.threshold": 0.5, **others}]


def test_values_make_a_recipe():
    recipe = with_values(tiny_recipe(), {"train.threshold.ship": 0.7, "train.student.args.epochs": 9})
    assert recipe.train.threshold == {"car": 0.3, "plane": 0.3, "ship": 0.7}
    assert recipe.train.student.args["epochs"] == 9 and recipe.train.student.args["imgsz"] == 64


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "space is empty"),
        ({"tiles.size_px": {"min": 64, "max": 128}}, "space names tiles.size_px"),
        ({"train.threshold": {"min": 0.5}}, "give min and max, or choices"),
        ({"train.threshold": {"min": 0.5, "max": 0.5}}, "must be below"),
        ({"train.threshold": {"choices": []}}, "choices is empty"),
    ],
)
def test_a_space_that_makes_no_sense_is_named(space, words):
    with pytest.raises(ValueError, match=words):
        tiny_recipe(search={"space": space})


def test_a_threshold_per_class_names_every_class():
    with pytest.raises(ValueError, match=r"train\.threshold names car, ship: give each of `classes` one"):
        tiny_recipe(train={"threshold": {"car": 0.1, "ship": 0.3}})
    with pytest.raises(RecipeError, match=r"train\.threshold names car, plane, ship, boat"):
        with_values(tiny_recipe(), {"train.threshold.boat": 0.1})


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.95), (0.0001, 0.01), (0.99999, 0.999999), (10.5, 900.0)])
def test_rounded_values_stay_in_the_space_and_apart(low, high):
    """A learning rate is not rounded like a threshold."""
    space = Search.model_validate({"space": {"train.student.args.lr0": {"min": low, "max": high}}}).space
    values = [
        rounded(space, {"train.student.args.lr0": v})["train.student.args.lr0"] for v in np.linspace(low, high, 500)
    ]
    assert min(values) >= low and max(values) <= high and len(set(values)) == 500
    np.testing.assert_allclose(values, np.linspace(low, high, 500), atol=(high - low) / 1000)


def test_automatic_thresholds_come_after_the_papers_one_for_each_class_where_they_vary():
    recipe = tiny_recipe(search={"space": {"train.threshold": {"min": 0.1, "max": 0.9}}})
    asked = [0.3, 0.41239, 0.95]  # the paper's again, and one outside
    assert [point["train.threshold"] for point in first_points(recipe, asked)] == [0.3, 0.5, 0.412]
    one, other = {"min": 0.1, "max": 0.9}, {"min": 0.1, "max": 0.9}
    recipe = tiny_recipe(search={"space": {"train.threshold.car": one, "train.threshold.ship": other}})
    found = first_points(recipe, [{"car": 0.2, "plane": 0.3, "ship": 0.45678}])
    assert found[-1] == {"train.threshold.car": 0.2, "train.threshold.ship": 0.457}
