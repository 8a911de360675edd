"""What may be varied, as Optuna, a grid and the curve see it."""

import numpy as np
import pytest
from conftest import tiny_recipe
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from softlabel.config import Search
from softlabel.errors import RecipeError
from softlabel.recipe_file import with_values
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
