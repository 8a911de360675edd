"""Test-time augmentation: a tile goes through one model several times, turned and at other sizes; boxes are fused.

By weighted box fusion (Solovyev et al., arXiv:1910.13302) of whole class vectors: a box that few views have found
scores less. A tile's boxes still depend on that tile alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from softlabel import rotated
from softlabel.detectors.detector import Detector
from softlabel.detectors.selection import Image
from softlabel.fusion import fuse_tile
from softlabel.records import Detections

IOU = 0.55
"""Boxes of one class from several views that overlap by more than this are fused: the paper's value."""

View = str | float
"""``fliplr``, ``flipud``, ``rot90``, or a factor on the size at which the model sees a tile."""


class AugmentedDetector(Detector):
    """A detector that looks at every tile as it is and in some views; what it finds has no objectness.

    Args:
        detector: The one that looks.
        views: The additional views; each costs one more forward pass.
    """

    def __init__(self, detector: Detector, views: Sequence[View]) -> None:
        self._detector, self._views = detector, tuple(views)
        self.nms, self.device = detector.nms, detector.device
        self.engine, self.precision = detector.engine, detector.precision

    def start(self, images: Sequence[Image], scale: float = 1.0) -> Callable[[], list[Detections]]:
        """As for Detector."""
        started = [self._detector.start(images, scale)]
        for view in self._views:
            factor = scale if isinstance(view, str) else scale * view
            started.append(self._detector.start([_seen(image, view) for image in images], factor))

        def finish() -> list[Detections]:
            whole, *others = [one() for one in started]
            return [self._fused(image, found) for image, *found in zip(images, whole, *others, strict=True)]

        return finish

    def _fused(self, image: Image, found: Sequence[Detections]) -> Detections:
        whole, *others = found
        back = [whole, *(undo(one, view, image.shape[:2]) for one, view in zip(others, self._views, strict=True))]
        fused = fuse_tile(back, [1.0] * len(back), self.nms.floor, IOU)
        above = fused.above(self.nms.floor)
        cut = len(above.boxes) > self.nms.max_det
        return replace(above.at(np.arange(min(len(above.boxes), self.nms.max_det))), saturated=fused.saturated or cut)


def _seen(image: Image, view: View) -> Image:
    match view:
        case "fliplr":
            return np.ascontiguousarray(image[:, ::-1])
        case "flipud":
            return np.ascontiguousarray(image[::-1])
        case "rot90":
            return np.ascontiguousarray(np.rot90(image))
    return image


def undo(found: Detections, view: View, tile_hw: tuple[int, int]) -> Detections:
    """What was found in a view, in pixels of the original tile.

    Args:
        found: In pixels of the view.
        view: Which view.
        tile_hw: Height and width of the tile.
    """
    height, width = tile_hw
    x0, y0, x1, y1 = found.boxes.T
    xywhr = rotated.drawn(found.boxes, found.xywhr)
    x, y, w, h, r = xywhr.T
    match view:
        case "fliplr":
            boxes, turned = (width - x1, y0, width - x0, y1), (width - x, y, w, h, -r)
        case "flipud":
            boxes, turned = (x0, height - y1, x1, height - y0), (x, height - y, w, h, -r)
        case "rot90":  # counterclockwise: the tile's right edge is the view's top
            boxes, turned = (width - y1, x0, width - y0, x1), (width - y, x, w, h, r + np.float32(np.pi / 2))
        case _:
            return found
    if found.xywhr is None:
        return replace(found, boxes=np.stack(boxes, axis=1))
    xywhr = rotated.regularized(np.stack(turned, axis=1)).astype(np.float32)
    return replace(found, boxes=np.stack(boxes, axis=1), xywhr=xywhr)
