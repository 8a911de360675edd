"""Crops of known colours end in the families that people would say."""

import numpy as np
import pytest

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
    crop[4:16, 8:32] = (200, 20, 30)
    crop[4:16, 26:32] = (20, 20, 20)  # a window
    shares = Colour().shares(iter([crop, np.zeros((1, 1, 3), np.uint8), np.full((1, 9, 3), 255, np.uint8)]))
    expected = np.zeros((3, len(FAMILIES)), np.float32)
    expected[0, FAMILIES.index("red")], expected[0, FAMILIES.index("black")] = 0.75, 0.25
    expected[1, FAMILIES.index("black")] = expected[2, FAMILIES.index("white")] = 1
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    assert Colour().shares([]).shape == (0, len(FAMILIES))
