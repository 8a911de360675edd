"""YOLOv5 as it was published: three anchors on each of three levels, and an objectness beside the classes.

ultralytics' package has its backbone and neck (yolov5.yaml) with a later, anchor-free head. Here they have the original
head again (Jocher et al., YOLOv5 v6.0 to v7.0, https://github.com/ultralytics/yolov5), with every tensor under its
original name, so that original weights fit.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from ultralytics.nn.modules import BottleneckCSP, Detect
from ultralytics.nn.tasks import DetectionModel, _SafeLoad, yaml_model_load

from softlabel.detectors.yolov5_loss import AnchorLoss
from softlabel.errors import RecipeError

COCO_ANCHORS = ((10, 13, 16, 30, 33, 23), (30, 61, 62, 45, 59, 119), (116, 90, 156, 198, 373, 326))
"""Width, height, width, ... in pixels of the model's input, for the levels of stride 8, 16 and 32."""

TRAIN_DEFAULTS = {"box": 0.05}
"""ultralytics train arguments whose default differs in YOLOv5 (data/hyps/hyp.scratch-low.yaml)."""

SIZES = "nsmlx"

_NAME = re.compile(rf"yolov5([{SIZES}])-anchor\.yaml")


def anchor_yaml(name: str) -> dict:
    """The yaml of one of the five sizes, with ``anchors`` as the original's yaml has them.

    Raises:
        RecipeError: There is no such size.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise RecipeError(f"no model {name}: give yolov5n-anchor.yaml, or s, m, l, x for n")
    yaml = yaml_model_load(f"yolov5{match[1]}.yaml")
    return {**yaml, "yaml_file": name, "anchors": [list(level) for level in COCO_ANCHORS]}


class AnchorDetect(nn.Module):
    """The original Detect head: one 1x1 convolution per level, with 4 box, 1 objectness and K class outputs per anchor.

    In training it returns the raw outputs, ``{"feats": [(B, anchors, height, width, 5 + K), ...]}``. Otherwise the
    decoded ones come before them, (B, 4 + K + 1, all anchors): box as centre and size in input pixels, per class
    objectness times class score, and the objectness last.
    """

    anchors: torch.Tensor
    stride: torch.Tensor

    def __init__(
        self, num_classes: int, anchors: Sequence[Sequence[float]], stride: torch.Tensor, ch: Sequence[int]
    ) -> None:
        super().__init__()
        self.nc, self.no, self.nl, self.na = num_classes, num_classes + 5, len(anchors), len(anchors[0]) // 2
        self.register_buffer("stride", stride.float(), persistent=False)
        in_pixels = torch.tensor(anchors, dtype=torch.float32).view(self.nl, self.na, 2)
        self.register_buffer("anchors", in_pixels / stride.view(-1, 1, 1))  # in cells, as original weights hold them
        self.m = nn.ModuleList(nn.Conv2d(channels, self.no * self.na, 1) for channels in ch)

    @classmethod
    def in_place_of(cls, head: Detect, anchors: Sequence[Sequence[float]], stride: torch.Tensor) -> "AnchorDetect":
        """An untrained head for the feature maps that an anchor-free head takes."""
        return cls(head.nc, anchors, stride, [branch[0].conv.in_channels for branch in head.cv2])

    def bias_init(self) -> None:
        """Start with some 8 objects per image of 640 px, each of any class (https://arxiv.org/abs/1708.02002, 3.3)."""
        for conv, stride in zip(self.m, self.stride.tolist(), strict=True):
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            bias = conv.bias.detach().view(self.na, -1)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.nc - 0.99999))

    def forward(self, x: list[torch.Tensor]) -> dict | tuple[torch.Tensor, dict]:
        """From the neck's feature maps to outputs."""
        raw = []
        for features, conv in zip(x, self.m, strict=True):
            out = conv(features)
            batch, _, height, width = out.shape
            raw.append(out.view(batch, self.na, self.no, height, width).permute(0, 1, 3, 4, 2).contiguous())
        return {"feats": raw} if self.training else (self._decode(raw), {"feats": raw})

    def _decode(self, raw: list[torch.Tensor]) -> torch.Tensor:
        levels = []
        for level, out in enumerate(raw):
            batch, _, height, width, _ = out.shape
            y = out.sigmoid()
            rows, columns = (torch.arange(size, device=out.device, dtype=y.dtype) for size in (height, width))
            cells = torch.stack((columns.expand(height, width), rows[:, None].expand(height, width)), dim=-1)
            stride = self.stride[level]
            xy = (y[..., :2] * 2 - 0.5 + cells) * stride
            wh = (y[..., 2:4] * 2) ** 2 * (self.anchors[level] * stride).view(1, self.na, 1, 1, 2)
            objectness = y[..., 4:5]
            levels.append(torch.cat((xy, wh, y[..., 5:] * objectness, objectness), -1).view(batch, -1, self.no))
        return torch.cat(levels, 1).transpose(1, 2)


class YoloV5(DetectionModel):
    """An ultralytics DetectionModel with the original head, and the original's loss."""

    def __init__(self, yaml: dict, num_classes: int) -> None:
        super().__init__(dict(yaml), nc=num_classes, verbose=False)
        replaced = self.model[-1]
        head = AnchorDetect.in_place_of(replaced, yaml["anchors"], self.stride)
        # What ultralytics' parser records on each layer: its index, its inputs, its name, its size.
        size = sum(parameter.numel() for parameter in head.parameters())
        vars(head).update(i=replaced.i, f=replaced.f, type="AnchorDetect", np=size)
        head.bias_init()
        self.model[-1] = head
        if "csp_activation" in yaml:  # YOLOv5 before v4, where it differs from the convolutions'
            for module in self.modules():
                if isinstance(module, BottleneckCSP):
                    module.act = _SafeLoad.activation(yaml["csp_activation"])

    def init_criterion(self) -> AnchorLoss:
        """The loss, with the gains of ``self.args``."""
        head, args = self.model[-1], self.args
        return AnchorLoss(head.anchors, head.nc, box=args.box, cls=args.cls, imgsz=args.imgsz)

    def set_anchors(self, anchors_LA2: NDArray[np.float32]) -> None:
        """Use other anchors: (levels, anchors, 2) width and height in pixels of the input, small to large."""
        head = self.model[-1]
        self.yaml["anchors"] = [level.reshape(-1).tolist() for level in anchors_LA2]
        head.anchors.copy_(torch.as_tensor(anchors_LA2) / head.stride.view(-1, 1, 1))

    def anchors_px(self) -> NDArray[np.float32]:
        """The anchors, (levels, anchors, 2) in pixels of the input."""
        head = self.model[-1]
        return (head.anchors * head.stride.view(-1, 1, 1)).float().cpu().numpy()
