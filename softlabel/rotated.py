"""Rotated box arithmetic. Boxes are ``xywhr`` (N, 5), as in ultralytics: centre, width and height in pixels, and
the angle in radians by which the width is turned from the x axis towards the y axis (y down: clockwise on screen).

Shape suffixes: N and M count boxes.
"""

from typing import Any

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

Floats = NDArray[Any]


def regularized(xywhr_N5: Floats) -> Floats:
    """The same rectangles with angles in [0, pi / 2): a quarter turn swaps width and height."""
    x, y, w, h, r = xywhr_N5.T
    swap = r % np.pi >= np.pi / 2
    return np.stack([x, y, np.where(swap, h, w), np.where(swap, w, h), r % (np.pi / 2)], axis=1)


def corners(xywhr_N5: Floats) -> Floats:
    """Corners (N, 4, 2) in order around the rectangle: counterclockwise on screen, and on a map with north up."""
    cos, sin = np.cos(xywhr_N5[:, 4]), np.sin(xywhr_N5[:, 4])
    across_N2 = np.stack([cos, sin], axis=1) * xywhr_N5[:, 2:3] / 2
    down_N2 = np.stack([-sin, cos], axis=1) * xywhr_N5[:, 3:4] / 2
    centre_N2 = xywhr_N5[:, :2]
    around = [-across_N2 - down_N2, down_N2 - across_N2, across_N2 + down_N2, across_N2 - down_N2]
    return np.stack([centre_N2 + offset_N2 for offset_N2 in around], axis=1)


def hulls(xywhr_N5: Floats) -> Floats:
    """The upright bounding boxes (N, 4), xyxy, of rotated boxes."""
    corners_N42 = corners(xywhr_N5)
    return np.concatenate([corners_N42.min(axis=1), corners_N42.max(axis=1)], axis=1)


def upright(boxes_N4: Floats) -> Floats:
    """Upright boxes, xyxy, as rotated ones with angle 0."""
    sizes_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
    centres_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    return np.concatenate([centres_N2, sizes_N2, np.zeros((len(boxes_N4), 1), boxes_N4.dtype)], axis=1)


def drawn(boxes_N4: Floats, xywhr_N5: Floats | None) -> Floats:
    """Boxes of either kind as rotated ones: ``xywhr_N5`` if there is one, else the upright boxes with angle 0."""
    return upright(boxes_N4) if xywhr_N5 is None else xywhr_N5


def unturned(xywhr_N5: Floats) -> Floats:
    """The rectangles before they are turned about their centres, xyxy (N, 4)."""
    half_N2 = xywhr_N5[:, 2:4] / 2
    return np.concatenate([xywhr_N5[:, :2] - half_N2, xywhr_N5[:, :2] + half_N2], axis=1)


def around(points_N2: Floats) -> Floats:
    """The minimum-area rectangle, (5,), around some points."""
    (x, y), (w, h), degrees = cv2.minAreaRect(points_N2.astype(np.float32))
    return regularized(np.array([[x, y, w, h, np.deg2rad(degrees)]]))[0]


def polygons(xywhr_N5: Floats) -> NDArray[np.object_]:
    """Shapely polygons (N,)."""
    return shapely.polygons(corners(xywhr_N5))


def aligned(xywhr_N5: Floats, angles_N: Floats) -> Floats:
    """The same rectangles, turned by quarters to the angles nearest to ``angles_N``, so that means make sense."""
    x, y, w, h, r = xywhr_N5.T
    quarters = np.round((angles_N - r) / (np.pi / 2))
    swap = quarters % 2 == 1
    return np.stack([x, y, np.where(swap, h, w), np.where(swap, w, h), r + quarters * np.pi / 2], axis=1)


def overlaps(one_N5: Floats, other_N5: Floats) -> Floats:
    """Areas (N,) that pairs of boxes share, in square pixels."""
    return shapely.area(shapely.intersection(polygons(one_N5), polygons(other_N5)))


def ious(one_N5: Floats, other_N5: Floats) -> Floats:
    """IoU (N,) of pairs of boxes."""
    shared_N = overlaps(one_N5, other_N5)
    return shared_N / (one_N5[:, 2:4].prod(axis=1) + other_N5[:, 2:4].prod(axis=1) - shared_N)
