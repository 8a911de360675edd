"""What is inside boxes, as pictures of their own."""

import cv2
import numpy as np
from numpy.typing import NDArray

from softlabel.detectors.queries import Crop
from softlabel.records import Detections


def cut_out(image: Crop, found: Detections) -> list[Crop]:
    """The pixels of each box, uint8 (H, W, 3), at least one; for a rotated box its interior, turned upright.

    Args:
        image: The tile, uint8 (H, W, 3).
        found: Boxes in its pixels. Where a rotated one extends beyond the tile, the tile's border is repeated.
    """
    if found.xywhr is not None:
        return [_turned_upright(image, box) for box in found.xywhr]
    return [_inside(image, box) for box in found.boxes]


def _inside(image: Crop, box: NDArray[np.float32]) -> Crop:
    spans = []
    for low, high, size in zip(box[:2], box[2:], image.shape[1::-1], strict=True):
        first = int(np.clip(np.floor(low), 0, size - 1))
        spans.append(slice(first, int(np.clip(np.ceil(high), first + 1, size))))
    columns, rows = spans
    return image[rows, columns]


def _turned_upright(image: Crop, xywhr: NDArray[np.float32]) -> Crop:
    x, y, w, h, angle = xywhr.astype(np.float64)
    width, height = max(1, round(w)), max(1, round(h))
    cos, sin = np.cos(angle), np.sin(angle)
    # From the crop to the tile, both in pixel indices; the centres of pixels lie half a pixel further.
    across, down = (width - 1) / 2, (height - 1) / 2
    to_tile = np.array(
        [[cos, -sin, x - 0.5 - cos * across + sin * down], [sin, cos, y - 0.5 - sin * across - cos * down]]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    found = cv2.warpAffine(image, to_tile, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return found.astype(np.uint8, copy=False)
