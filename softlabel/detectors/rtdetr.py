"""ultralytics' RT-DETR as a teacher that keeps the class vector of every box.

Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection" (arXiv:2304.08069). Its decoder outputs a fixed number of
boxes, each with a vector of independent class scores, and no two for the same object: NMS at IoU 1 leaves them as they
are.
"""

from dataclasses import dataclass
from typing import Any, Unpack

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from ultralytics.nn.tasks import DetectionModel

from softlabel.detectors.detector import Detector
from softlabel.detectors.engines import EngineOptions, Network
from softlabel.detectors.families import Teacher
from softlabel.detectors.resize import resized
from softlabel.detectors.selection import Geometry, Image
from softlabel.detectors.weights import load_model
from softlabel.records import Nms


class RtDetrDetector(Detector):
    """An RT-DETR over tiles of any shape.

    Args:
        model: Taken over.
        imgsz: Side of the square that a tile is squashed to, in pixels.
        nms: What is kept of a forward pass.
        device: As for Detector.
        options: As for Detector; the engine is pytorch.
    """

    def __init__(
        self,
        model: DetectionModel,
        imgsz: int,
        nms: Nms,
        device: torch.device | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.imgsz = imgsz
        network = _RtDetrNetwork(model.eval().float().fuse(verbose=False), imgsz)
        super().__init__(network, int(model.model[-1].nc), nms, device, **options)

    def geometry(self, tile_hw: tuple[int, int], scale: float = 1.0) -> Geometry:
        """Squashing to a square, as ultralytics does to predict."""
        return _Squash(tile_hw, self.imgsz)


def load(teacher: Teacher, **options: Unpack[EngineOptions]) -> RtDetrDetector:
    """The detector of a weights file."""
    model, header = load_model(teacher.weights)
    return RtDetrDetector(model, teacher.imgsz or header.imgsz, teacher.nms, **options)


class _RtDetrNetwork(Network):
    def __init__(self, model: Any, imgsz: int) -> None:
        super().__init__()
        self.model, self.imgsz, self.dtype = model, imgsz, torch.float32

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, Any]:
        _, (boxes, logits, *_) = self.model((tiles.to(self.dtype) / 255).permute(0, 3, 1, 2))
        # The decoder's last layer gives the answer; outside training it is the only one returned.
        decoded = torch.cat((boxes[-1].float() * self.imgsz, logits[-1].float().sigmoid()), -1)
        return decoded.transpose(1, 2), None

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Everything but the scaling of boxes to pixels and the sigmoid of scores, which stay in float32."""
        self.dtype = dtype
        self.model.to(dtype)


@dataclass(frozen=True)
class _Squash:
    """Squashes tiles to a square, and brings boxes back."""

    tile_hw: tuple[int, int]
    side: int

    def apply(self, image: Image) -> Image:
        if self.tile_hw == (self.side, self.side):
            return image
        return cv2.resize(image, (self.side, self.side), interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)

    def apply_to_batch(self, tiles: torch.Tensor) -> torch.Tensor:
        return resized(tiles, (self.side, self.side))

    def undo(self, boxes_N4: NDArray[np.float32]) -> NDArray[np.float32]:
        height, width = self.tile_hw
        return boxes_N4 * np.array([width / self.side, height / self.side] * 2, np.float32)
