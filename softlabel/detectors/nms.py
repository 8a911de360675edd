"""Class-wise greedy NMS of one image's boxes, with the class vectors of what is kept."""

import importlib.util
from pathlib import Path

import torch

from softlabel.records import Nms

MAX_CANDIDATES = 30_000  # of a tile, best first, as ultralytics has it: NMS grows with their square


def _load_operators() -> None:
    """torchvision's NMS without its Python package, which brings torch.compile's machinery: half of what a labelling
    process takes to start."""
    spec = importlib.util.find_spec("torchvision")
    for path in Path(spec.origin).parent.glob("_C*.so") if spec and spec.origin else ():
        torch.ops.load_library(path)
    if not hasattr(torch.ops.torchvision, "nms"):
        import torchvision  # noqa: F401


_load_operators()


def suppressed(decoded: torch.Tensor, num_classes: int, nms: Nms) -> torch.Tensor:
    """What is kept of one image: class-wise greedy NMS of the best class, best first, one more than ``max_det``.

    Args:
        decoded: (4 + K, A) or (4 + K + 1, A), boxes as centre and size.
        num_classes: K.
        nms: Floor, IoU and how many.

    Returns:
        (N, 4 + K) or (N, 4 + K + 1), boxes as xyxy.
    """
    best, class_ids = decoded[4 : 4 + num_classes].max(0)
    chosen = (best > nms.floor).nonzero().flatten()
    chosen = chosen[best[chosen].argsort(descending=True, stable=True)[:MAX_CANDIDATES]]
    rows, best, class_ids = decoded[:, chosen].T, best[chosen], class_ids[chosen]
    boxes = corners(rows[:, :4])
    # Worse boxes never decide on better ones: the best few suffice where they leave more than is wanted.
    most = nms.max_det + 1
    tried = most + most // 4
    while len(kept := _kept(boxes[:tried], best[:tried], class_ids[:tried], nms.iou)) < most and tried < len(best):
        tried *= 2
    kept = kept[:most]
    return torch.cat((boxes[kept], rows[kept, 4:]), 1)


def corners(xywh: torch.Tensor) -> torch.Tensor:
    """(..., 4) centre and size to xyxy."""
    half = xywh[..., 2:4] / 2
    return torch.cat((xywh[..., :2] - half, xywh[..., :2] + half), -1)


def _kept(boxes: torch.Tensor, best: torch.Tensor, class_ids: torch.Tensor, iou: float) -> torch.Tensor:
    """Class by class. (Boxes of classes moved apart, for one call, would lose their last bits in float32.)"""
    present = class_ids.unique()
    if len(present) == 1:
        return torch.ops.torchvision.nms(boxes, best, iou)
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for class_id in present:
        members = (class_ids == class_id).nonzero().flatten()
        keep[members[torch.ops.torchvision.nms(boxes[members], best[members], iou)]] = True
    return keep.nonzero().flatten()
