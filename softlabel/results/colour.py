"""Which colours a crop shows: the share of its pixels in each of several families, as people name them.

Shape suffixes: P counts pixels, F families.
"""

from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

from softlabel.detectors.queries import Crop

FAMILIES = ("white", "grey", "black", "red", "orange-brown", "yellow", "green", "blue")
"""What cars are told apart by, after the example of Ciolino, Rosario and Noever (arXiv:2212.00585)."""

# No source has borders that hold everywhere; these are ours. A pixel with little chroma in CIE Lab is white, grey or
# black by its lightness (HSV would call the noise of a shadow a strong colour); others go by their hue in HSV, with
# borders between the wheel's red 0, orange 30, yellow 60, green 120, blue 240 and magenta 300. Yellow is kept narrow,
# since anything greener passes for green; cyan and violet count as blue, pink as red. Brown is dark orange.
_LEAST_CHROMA = 14.0
_BLACK_BELOW, _WHITE_FROM = 30.0, 75.0  # lightness, of 100
_HUE_BORDERS = ((15, "red"), (45, "orange-brown"), (70, "yellow"), (165, "green"), (285, "blue"), (361, "red"))
"""Degrees below which a hue gets that name."""
_CENTRE = 0.6  # of width and height: a box's corners show what surrounds the object


class Colour:
    """The attribute ``colour`` of a crop."""

    names = FAMILIES
    runs_model = False

    def identity(self) -> dict:
        """All that decides the shares."""
        borders = {"chroma": _LEAST_CHROMA, "lightness": [_BLACK_BELOW, _WHITE_FROM], "hues": list(_HUE_BORDERS)}
        return {"attribute": "colour", "families": list(FAMILIES), "centre": _CENTRE, **borders}

    def shares(self, crops: Iterable[Crop]) -> NDArray[np.float32]:
        """(N, F), the share of the pixels in the middle of each crop that are of each family; rows sum to 1.

        Args:
            crops: uint8 (H, W, 3) RGB, of at least one pixel.
        """
        return np.array([_shares(_middle(crop)) for crop in crops], np.float32).reshape(-1, len(FAMILIES))


def families(pixels: Crop) -> NDArray[np.int64]:
    """The family of each pixel (H, W) of uint8 (H, W, 3) RGB, by its place in FAMILIES."""
    shares = pixels.astype(np.float32) / 255
    lightness, a, b = np.moveaxis(cv2.cvtColor(shares, cv2.COLOR_RGB2Lab), 2, 0)
    hue = cv2.cvtColor(shares, cv2.COLOR_RGB2HSV)[..., 0]
    by_hue = np.array([FAMILIES.index(name) for _, name in _HUE_BORDERS])
    by_lightness = np.array([FAMILIES.index(name) for name in ("black", "grey", "white")])
    return np.where(
        np.hypot(a, b) < _LEAST_CHROMA,
        by_lightness[np.digitize(lightness, [_BLACK_BELOW, _WHITE_FROM])],
        by_hue[np.digitize(hue, [border for border, _ in _HUE_BORDERS[:-1]])],
    )


def _shares(pixels: Crop) -> NDArray[np.float64]:
    counts_F = np.bincount(families(pixels).ravel(), minlength=len(FAMILIES))
    return counts_F / counts_F.sum()


def _middle(crop: Crop) -> Crop:
    margins = [int(side * (1 - _CENTRE) / 2) for side in crop.shape[:2]]
    rows, columns = (slice(margin, side - margin) for margin, side in zip(margins, crop.shape[:2], strict=True))
    return crop[rows, columns]
