"""A YOLO detector that keeps the class vector of every box."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules import OBB, Conv
from ultralytics.nn.tasks import DetectionModel

from softlabel import rotated
from softlabel.detectors.detector import Detector
from softlabel.detectors.engines import EngineOptions, Network, Outputs
from softlabel.detectors.families import Teacher
from softlabel.detectors.letterbox import Letterbox
from softlabel.detectors.selection import Geometry, Image, Selection
from softlabel.detectors.tile_loss import TileLoss
from softlabel.detectors.weights import default_train_args, load_model
from softlabel.detectors.yolov5 import AnchorDetect
from softlabel.records import Detections, Nms, Truth


class YoloDetector(Detector):
    """A YOLO model over tiles of any size.

    A tile is scaled so that its longer side is ``imgsz`` and padded to a multiple of the stride, by its shape alone.

    Args:
        model: Taken over: it is moved, fused and, for a precision other than float32, changed.
        imgsz: Longer side of a tile as the model sees it, in pixels.
        nms: What is kept of a forward pass.
        device: As for Detector.
        options: As for Detector.
    """

    def __init__(
        self,
        model: DetectionModel,
        imgsz: int,
        nms: Nms,
        device: torch.device | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        if hasattr(model.model[-1], "end2end"):
            model.model[-1].end2end = False  # v10 and 26: class vectors and NMS need the one-to-many head
        self.imgsz = imgsz
        self._stride = int(model.stride.max())
        self._model = model.eval().float().fuse(verbose=False)
        self._loss: TileLoss | None = None
        self._losing = threading.Lock()  # a criterion keeps the normaliser of the tile in hand
        head = model.model[-1]
        super().__init__(_YoloNetwork(self._model), int(head.nc), nms, device, rotated=isinstance(head, OBB), **options)

    @classmethod
    def from_weights(
        cls,
        weights: Path | str,
        nms: Nms,
        imgsz: int | None = None,
        **options: Unpack[EngineOptions],
    ) -> "YoloDetector":
        """From a weights file; ``imgsz`` defaults to the size that it was trained at, the rest is as for the class.

        Raises:
            WeightsError: The weights cannot be read.
        """
        model, header = load_model(weights)
        imgsz = imgsz or header.imgsz
        gains = {k: v for k, v in header.train_args.items() if k in ("box", "cls", "dfl", "angle")}
        model.args = get_cfg(overrides={**default_train_args(header.yaml), **gains, "imgsz": imgsz})
        return cls(model, imgsz, nms, **options)

    def geometry(self, tile_hw: tuple[int, int], scale: float = 1.0) -> Geometry:
        """Letterboxing."""
        return Letterbox.of(tile_hw, round(self.imgsz * scale), self._stride)

    def losses(self, images: Sequence[Image], truths: Sequence[Truth]) -> list[list[float]]:
        """For each tile, the loss terms against its truth (softlabel.detectors.tile_loss): sums, then normalisers."""
        return [losses for _, losses in self.detect_with_losses(images, truths)]

    def detect_with_losses(
        self, images: Sequence[Image], truths: Sequence[Truth]
    ) -> list[tuple[Detections, list[float]]]:
        """Both, from one forward pass.

        Raises:
            ValueError: The engine is not PyTorch in float32, the only one that gives losses.
        """
        if (self.engine, self.precision) != ("pytorch", "float32"):
            raise ValueError("losses need engine pytorch in float32")

        def both(outputs: Outputs, selection: Selection, indices: list[int]) -> list[tuple[Detections, list[float]]]:
            letterbox, found = cast(Letterbox, selection.geometry), selection.of_each(outputs.decoded)
            with self._losing:
                losses = [self._tile_loss(outputs.raw, i, letterbox, truths[index]) for i, index in enumerate(indices)]
            return list(zip(found, losses, strict=True))

        return self._start(images, both)()

    def loss_names(self) -> list[str]:
        """The loss that each term of ``losses`` is part of, in order."""
        return self._tile_loss_of_model().names()

    def _tile_loss_of_model(self) -> TileLoss:
        if self._loss is None:
            self._loss = TileLoss(self._model)
        return self._loss

    def _tile_loss(self, raw: dict, position: int, letterbox: "Letterbox", truth: Truth) -> list[float]:
        known = truth.at(~truth.ignore)  # as in training
        boxes, angles = known.boxes, None
        if self._rotated:
            xywhr = rotated.drawn(known.boxes, known.xywhr)
            boxes, angles = rotated.unturned(xywhr), xywhr[:, 4]
        in_input = boxes * letterbox.scale_4 + np.array(letterbox.pad_xy * 2, np.float32)
        return self._tile_loss_of_model()(raw, position, in_input, known.class_ids, letterbox.size_hw, angles)


def load(teacher: Teacher, **options: Unpack[EngineOptions]) -> YoloDetector:
    """The detector of a weights file."""
    return YoloDetector.from_weights(teacher.weights, teacher.nms, teacher.imgsz, **options)


def _conv_silu(conv: nn.Conv2d, features: torch.Tensor) -> torch.Tensor:
    """The fused operator that torch.compile makes of the two on a CPU, but without a compiler."""
    return torch.ops.mkldnn._convolution_pointwise(
        features, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups, "swish", [], ""
    )


def _decode_in_float32(decode: Callable[[list], torch.Tensor], raw: list[torch.Tensor]) -> torch.Tensor:
    """AnchorDetect's decoding of outputs computed in a lower precision."""
    return decode([out.float() for out in raw])


def _infer_in_float32(infer: Callable[[dict], torch.Tensor], raw: dict) -> torch.Tensor:
    """The same for ultralytics' Detect."""
    # Only the shape and dtype of the features matter here: the grid takes both from them.
    features = [level[:, :1].float() for level in raw["feats"]]
    outputs = {key: raw[key].float() for key in ("boxes", "scores", "angle") if key in raw}
    return infer({**outputs, "feats": features})


class _YoloNetwork(Network):
    """One of ultralytics' detection models, or a YOLOv5."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.dtype = model, torch.float32
        self._grids: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor, torch.Size]] | None = None

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, Any]:
        head, grids, shape = self.model.model[-1], self._grids, tuple(tiles.shape[1:3])
        if grids is None or isinstance(head, AnchorDetect):
            return self._answer(tiles)
        if shape in grids:
            head.anchors, head.strides, features = grids[shape]
            head.shape = torch.Size((len(tiles), *features))
        answer = self._answer(tiles)
        grids.setdefault(shape, (head.anchors, head.strides, head.shape[1:]))
        return answer

    def _answer(self, tiles: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return self.model((tiles.to(self.dtype) / 255).permute(0, 3, 1, 2))

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Everything up to the head's last convolutions; the decoding after them stays in float32."""
        self.dtype = dtype
        *layers, head = self.model.model
        for module in [*layers, *(child for name, child in head.named_children() if name != "dfl")]:
            module.to(dtype)
        # Partials, which are copied along with the network: closures would go on decoding with the original head.
        if isinstance(head, AnchorDetect):
            head._decode = partial(_decode_in_float32, head._decode)  # type: ignore[method-assign]
        else:
            head._inference = partial(_infer_in_float32, head._inference)

    def fuse_activations(self) -> None:
        """Fuse every convolution with its SiLU: the output is written to memory once instead of twice."""
        if self.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return
        for module in self.model.modules():
            if isinstance(module, Conv) and isinstance(module.act, nn.SiLU):
                module.forward = partial(_conv_silu, module.conv)

    def make_capturable(self) -> bool:
        """Keep the grid of each shape: an anchor-free head makes a new one, on the CPU, whenever the shape changes. A
        graph goes on using the grid that it was captured with."""
        self._grids = {}
        return True

    def make_traceable(self) -> None:
        """Let the grid of an anchor-free head follow the input's shape: otherwise it stays the last image's, and is
        made with the strides as tensors, whose values no tracer knows."""
        head = self.model.model[-1]
        if not isinstance(head, AnchorDetect):
            head.dynamic, head.stride = True, head.stride.tolist()
