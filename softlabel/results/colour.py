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
_CENTRE = 0.5  # of width and height: a box's corners show what surrounds the object

# A white car under haze, or in a short exposure, is grey in pixels, and people call it white by what is around it. So
# the darkest of a tile is taken for haze, within reason, and its brightest for white.
_DARKEST, _BRIGHTEST = 0.5, 99.0  # percentiles of a tile's luma
_MOST_HAZE = 10.0  # of 255: where nothing is dark, darkness is no measure of haze
_NEAR_WHITE = 242.0
_MOST_GAIN = 1.5  # where nothing is bright, grey must not become white


class Colour:
    """The attribute ``colour`` of a crop."""

    names = FAMILIES
    runs_model = False

    def identity(self) -> dict:
        """All that decides the shares."""
        borders = {"chroma": _LEAST_CHROMA, "lightness": [_BLACK_BELOW, _WHITE_FROM], "hues": list(_HUE_BORDERS)}
        levels = {"percentiles": [_DARKEST, _BRIGHTEST], "haze": _MOST_HAZE, "white": _NEAR_WHITE, "gain": _MOST_GAIN}
        return {"attribute": "colour", "families": list(FAMILIES), "centre": _CENTRE, **borders, "levels": levels}

    def prepare(self, tile: Crop) -> Crop:
        """The tile (H, W, 3) without its haze and as if well exposed.

        What its darkest pixels have is taken off all of them (dark-object subtraction, Chavez 1988,
        doi:10.1016/0034-4257(88)90019-3), then all are brightened until the brightest are near white (the white patch
        of Land and McCann 1971, doi:10.1364/JOSA.61.000001). Unlike there, the three channels are treated alike, so
        hues stay what they are. Black pixels have no value, as at a scene's edge, and do not count.
        """
        luma = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)
        if not luma.any():
            return tile
        darkest, brightest = np.percentile(luma[luma > 0], [_DARKEST, _BRIGHTEST])
        haze = min(darkest, _MOST_HAZE)
        gain = min(max(brightest, _NEAR_WHITE) / max(brightest - haze, 1), _MOST_GAIN)
        return np.clip((tile - np.float32(haze)) * np.float32(gain) + 0.5, 0, 255).astype(np.uint8)

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
