"""DETR and its successors in transformers, as teachers that keep the class vector of every box.

Carion et al., "End-to-End Object Detection with Transformers" (arXiv:2005.12872), and its successors. A fixed number of
queries answer, no two for the same object: NMS at IoU 1 leaves them as they are.
"""

from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from softlabel.detectors.detector import Detector
from softlabel.detectors.engines import EngineOptions, Network
from softlabel.detectors.families import Teacher
from softlabel.detectors.hub import local_folder
from softlabel.detectors.pretrained import SIDE, Shares, from_folder
from softlabel.detectors.selection import Geometry
from softlabel.records import Nms

_WITH_NO_OBJECT = {"detr", "yolos"}
"""Models whose last logit is for no object, all under one softmax; the other models' logits are independent."""


class DetrDetector(Detector):
    """A transformers detector whose boxes are in fractions of the image.

    Args:
        folder: The model's, as softlabel.detectors.hub.local_folder gives it.
        nms: What is kept of a forward pass.
        device: As for Detector.
        options: As for Detector; the engine is pytorch.

    Raises:
        WeightsError: The model cannot be loaded.
    """

    def __init__(
        self, folder: Path, nms: Nms, device: torch.device | None = None, **options: Unpack[EngineOptions]
    ) -> None:
        model, processor = from_folder(folder, AutoModelForObjectDetection, AutoImageProcessor)
        super().__init__(_DetrNetwork(model, processor), model.config.num_labels, nms, device, **options)

    def geometry(self, tile_hw: tuple[int, int], scale: float = 1.0) -> Geometry:
        """Tiles as they are: the model's own processor resizes them."""
        return Shares(tile_hw)


def load(teacher: Teacher, **options: Unpack[EngineOptions]) -> DetrDetector:
    """The detector of a folder, or of a name on the hub."""
    return DetrDetector(local_folder(str(teacher.weights)), teacher.nms, **options)


class _DetrNetwork(Network):
    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self._processor, self._dtype = model, processor, torch.float32

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, Any]:
        inputs = self._processor(
            images=list(tiles.permute(0, 3, 1, 2)), input_data_format="channels_first", return_tensors="pt"
        )
        with torch.autocast(tiles.device.type, self._dtype, enabled=self._dtype != torch.float32):
            found = self.model(**inputs.to(tiles.device))
        logits, boxes = found.logits.float(), found.pred_boxes.float()
        none = self.model.config.model_type in _WITH_NO_OBJECT
        scores = logits.softmax(-1)[..., :-1] if none else logits.sigmoid()
        return torch.cat((boxes * SIDE, scores), -1).transpose(1, 2), None

    def lower_precision(self, dtype: torch.dtype) -> None:
        """By autocast; scores are decoded in float32, and the boxes that the model has computed are scaled in it."""
        self._dtype = dtype
