"""Box arithmetic. Boxes are ``xyxy`` (N, 4), x right, y down, max edges exclusive, in pixels.

Shape suffixes: N and M count boxes.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def area(boxes_N4: Floats) -> Floats:
    """Areas (N,) in square pixels; an inverted box has area 0."""
    wh = np.clip(boxes_N4[:, 2:] - boxes_N4[:, :2], 0, None)
    return wh[:, 0] * wh[:, 1]


def iou_matrix(boxes_N4: Floats, boxes_M4: Floats) -> Floats:
    """Intersection over union (N, M) in [0, 1]; 0 where both boxes are empty."""
    top_left = np.maximum(boxes_N4[:, None, :2], boxes_M4[None, :, :2])
    bottom_right = np.minimum(boxes_N4[:, None, 2:], boxes_M4[None, :, 2:])
    wh = np.clip(bottom_right - top_left, 0, None)
    intersection = wh[..., 0] * wh[..., 1]
    union = area(boxes_N4)[:, None] + area(boxes_M4)[None] - intersection
    iou = np.zeros(union.shape, np.result_type(boxes_N4, boxes_M4))
    np.divide(intersection, union, out=iou, where=union > 0)
    return iou


def clip(boxes_N4: Floats, window_xyxy: tuple[float, float, float, float]) -> Floats:
    """Boxes cut to a window, in the coordinates they came in; a box outside becomes empty at the border."""
    low = np.array(window_xyxy[:2] * 2, dtype=boxes_N4.dtype)
    high = np.array(window_xyxy[2:] * 2, dtype=boxes_N4.dtype)
    return np.clip(boxes_N4, low, high)
