"""Crops of known colours end in the families that people would say."""

import cv2
import numpy as np
import pytest
from subtypes import finer_recipe, told_colours

from softlabel.config import Synthetic
from softlabel.results.colour import FAMILIES, Colour, families


def name_of(rgb):
    return FAMILIES[families(np.array([[rgb]], np.uint8))[0, 0]]


@pytest.mark.parametrize(
    ("family", "colours"),
    {
        "white": [(255, 255, 255), (235, 236, 240), (200, 200, 196)],
        "grey": [(128, 128, 128), (160, 160, 165), (90, 94, 92)],
        "black": [(0, 0, 0), (20, 20, 24), (50, 50, 50), (12, 16, 28)],  # the last a shadow, blue by its hue
        "red": [(200, 20, 30), (120, 10, 10), (230, 60, 60), (220, 60, 120)],
        "orange-brown": [(240, 130, 20), (120, 72, 30), (150, 110, 70)],
        "yellow": [(250, 220, 30), (200, 180, 20)],
        "green": [(30, 140, 50), (20, 70, 30), (90, 160, 60)],
        "blue": [(20, 40, 180), (40, 60, 110), (90, 160, 220), (0, 180, 200)],
    }.items(),
)
def test_a_colour_is_of_its_family(family, colours):
    assert [name_of(rgb) for rgb in colours] == [family] * len(colours)


def test_every_pixel_is_of_one_family():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = families(pixels)
    assert found.shape == (64, 64) and set(found.ravel()) == set(range(len(FAMILIES)))


def test_shares_are_of_the_middle_and_sum_to_one():
    crop = np.full((20, 40, 3), 128, np.uint8)  # a road
    crop[5:15, 10:30] = (200, 20, 30)
    crop[5:15, 25:30] = (20, 20, 20)  # a window
    shares = Colour().shares(iter([crop, np.zeros((1, 1, 3), np.uint8), np.full((1, 9, 3), 255, np.uint8)]))
    expected = np.zeros((3, len(FAMILIES)), np.float32)
    expected[0, FAMILIES.index("red")], expected[0, FAMILIES.index("black")] = 0.75, 0.25
    expected[1, FAMILIES.index("black")] = expected[2, FAMILIES.index("white")] = 1
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    assert Colour().shares([]).shape == (0, len(FAMILIES))


@pytest.mark.parametrize("difficulty", [0.1, 0.3])
def test_made_up_cars_have_the_colour_that_they_were_painted_in(difficulty, tmp_path):
    """Nine of ten, on scenes as hard as those of the recipes that come along, and of the default difficulty."""
    scenes = Synthetic(num_scenes=25, scene_size_px=384, difficulty=difficulty)
    told = told_colours(*finer_recipe(tmp_path, scenes, seed=7))
    assert len(told) > 100 and len({one.known for one in told}) == 6
    assert np.mean([one.found == one.known for one in told]) >= 0.9


def levels(ground, dark, bright, size=(100, 100)):
    """A tile of ground with a hundredth of dark pixels and a fiftieth of bright ones."""
    image = np.full((*size, 3), ground, np.uint8)
    image[:1], image[1:3] = dark, bright
    return image


def prepared(image):
    """The colours that the ground, the darkest and the brightest become."""
    found = Colour().prepare(image)
    assert found.dtype == np.uint8 and found.shape == image.shape
    return found[50, 50].tolist(), found[0, 0].tolist(), found[1, 1].tolist()


def test_haze_is_taken_off_and_the_brightest_is_near_white():
    assert prepared(levels(120, 10, 186)) == ([151] * 3, [0] * 3, [242] * 3)  # (v - 10) * 242 / 176
    assert prepared(levels(120, 4, 246)) == ([118] * 3, [0] * 3, [246] * 3)  # what is white stays white


def test_what_shows_nothing_dark_or_bright_is_changed_little():
    assert prepared(levels(100, 90, 110)) == ([135] * 3, [120] * 3, [150] * 3)  # (v - 10) * 1.5
    assert prepared(levels(0, 0, 0)) == ([0] * 3, [0] * 3, [0] * 3)


def test_pixels_without_a_value_do_not_count():
    scene = levels(120, 10, 186)
    beyond = np.concatenate([scene, np.zeros((900, 100, 3), np.uint8)])
    np.testing.assert_array_equal(Colour().prepare(beyond)[:100], Colour().prepare(scene))


def test_a_hue_stays_what_it_is():
    colours = np.array([[(200, 60, 70), (60, 90, 150), (180, 160, 60), (70, 130, 90)]], np.uint8)
    image = levels(120, 10, 186)
    image[50, 50:54] = colours
    hues = [
        cv2.cvtColor(one.astype(np.float32), cv2.COLOR_RGB2HSV)[..., 0]
        for one in (colours, Colour().prepare(image)[50:51, 50:54])
    ]
    np.testing.assert_allclose(*hues, atol=1)


def test_a_white_car_under_haze_is_white_and_a_grey_one_grey():
    image = levels(90, 40, 190)
    image[40:60, 20:40], image[40:60, 60:80] = 180, 120
    crops = [image[40:60, 20:40], image[40:60, 60:80]]
    assert [FAMILIES[k] for k in Colour().shares(crops).argmax(axis=1)] == ["grey", "grey"]
    seen = Colour().prepare(image)
    crops = [seen[40:60, 20:40], seen[40:60, 60:80]]
    assert [FAMILIES[k] for k in Colour().shares(crops).argmax(axis=1)] == ["white", "grey"]
