"""YOLOs that ultralytics exported to ONNX, run by onnxruntime; the class vector of every box is kept."""

from typing import Any, Unpack

import torch

from softlabel.detectors.detector import Detector
from softlabel.detectors.engines import EngineOptions, Network
from softlabel.detectors.families import Teacher
from softlabel.detectors.header import Header
from softlabel.detectors.letterbox import Letterbox
from softlabel.detectors.onnx_file import open_session, read_onnx_header
from softlabel.detectors.selection import Geometry
from softlabel.records import Nms


class OnnxDetector(Detector):
    """An exported YOLO over tiles of any shape.

    Args:
        session: An onnxruntime session.
        header: As read_onnx_header gives it.
        nms: What is kept of a forward pass.
        options: As for Detector; the engine is pytorch, which here only moves tensors.
    """

    def __init__(self, session: Any, header: Header, nms: Nms, **options: Unpack[EngineOptions]) -> None:
        stride, task = header.yaml["head"][-1][3]
        self.imgsz, self._stride = header.imgsz, stride
        height, width = session.get_inputs()[0].shape[2:]
        self._fixed_hw = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        num_classes, rotated = len(header.classes), task == "obb"
        network = _OnnxNetwork(session, num_classes, rotated)
        super().__init__(network, num_classes, nms, torch.device("cpu"), rotated=rotated, **options)

    def geometry(self, tile_hw: tuple[int, int], scale: float = 1.0) -> Geometry:
        """Letterboxing, padded to the graph's own input size where that is fixed."""
        if self._fixed_hw is None:
            return Letterbox.of(tile_hw, round(self.imgsz * scale), self._stride)
        fitting = min(fixed * max(tile_hw) // side for fixed, side in zip(self._fixed_hw, tile_hw, strict=True))
        return Letterbox.of(tile_hw, fitting, self._stride).padded_to(self._fixed_hw)


def load(teacher: Teacher, **options: Unpack[EngineOptions]) -> OnnxDetector:
    """The detector of an .onnx."""
    # With several passes at a time each has one core.
    session = open_session(teacher.weights, None if options.get("threads") is None else 1)
    return OnnxDetector(session, read_onnx_header(teacher.weights), teacher.nms, **options)


class _OnnxNetwork(Network):
    def __init__(self, session: Any, num_classes: int, rotated: bool) -> None:
        super().__init__()
        self._session, self._num_classes, self._rotated = session, num_classes, rotated
        (found,) = session.get_inputs()
        self._name, self._batch = found.name, found.shape[0] if isinstance(found.shape[0], int) else None
        self._dtype = torch.float16 if "float16" in found.type else torch.float32

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, Any]:
        pixels = (tiles.to(self._dtype) / 255).permute(0, 3, 1, 2).contiguous()
        parts = [self._run(part) for part in pixels.split(self._batch or len(pixels))]
        decoded = torch.cat(parts).float()
        kept = 4 + self._num_classes
        angle = decoded[:, -1:] if self._rotated else decoded[:, :0]
        return torch.cat((decoded[:, :kept], angle), 1), None

    def _run(self, pixels: torch.Tensor) -> torch.Tensor:
        size = len(pixels)
        if self._batch and size < self._batch:  # a graph with a fixed batch size takes no fewer
            pixels = torch.cat((pixels, pixels.new_zeros(self._batch - size, *pixels.shape[1:])))
        return torch.from_numpy(self._session.run(None, {self._name: pixels.numpy()})[0])[:size]

    def __deepcopy__(self, memo: dict) -> "_OnnxNetwork":
        return self  # threads may share a session

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Nothing to do: the graph keeps the precision that it was exported with."""
