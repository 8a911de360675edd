"""Class-wise greedy NMS of one image's boxes, keeping the class vectors of the survivors."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from softlabel.detectors.agreement import agreement_upright
from softlabel.records import Nms

MAX_CANDIDATES = 30_000  # per tile, best first, as in ultralytics: the cost of NMS grows with their square


def _load_operators() -> None:
    """Load torchvision's NMS without its Python package, which brings in torch.compile's machinery: half of the time
    that a labelling process takes to start."""
    spec = importlib.util.find_spec("torchvision")
    for path in Path(spec.origin).parent.glob("_C*.so") if spec and spec.origin else ():
        torch.ops.load_library(path)
    if not hasattr(torch.ops.torchvision, "nms"):
        import torchvision  # noqa: F401


_load_operators()


def suppressed(decoded: torch.Tensor, num_classes: int, nms: Nms) -> torch.Tensor:
    """What is kept of one image: class-wise greedy NMS by best class, best first, at most one more than ``max_det``.

    Args:
        decoded: (4 + K, A) or (4 + K + 1, A), boxes as centre and size.
        num_classes: K.
        nms: Floor, IoU and ``max_det``.

    Returns:
        (N, 4 + K + 1) or (N, 4 + K + 2), boxes as xyxy, and their agreement last (softlabel.detectors.agreement).
    """
    best, class_ids = decoded[4 : 4 + num_classes].max(0)
    chosen = (best > nms.floor).nonzero().flatten()
    chosen = chosen[best[chosen].argsort(descending=True, stable=True)[:MAX_CANDIDATES]]
    rows, best, class_ids = decoded[:, chosen].T, best[chosen], class_ids[chosen]
    boxes = corners(rows[:, :4])
    # Worse boxes never suppress better ones, so the best few suffice if they leave more than max_det.
    most = nms.max_det + 1
    tried = most + most // 4
    while len(kept := _kept(boxes[:tried], best[:tried], class_ids[:tried], nms.iou)) < most and tried < len(best):
        tried *= 2
    kept = kept[:most]
    seen = num_seen(kept, len(best), nms)
    agreed = agreement_upright(boxes[:seen], class_ids[:seen], best[:seen], kept, limit_of(nms.iou))
    return torch.cat((boxes[kept], rows[kept, 4:], agreed[:, None]), 1)


def num_seen(kept: torch.Tensor, num_candidates: int, nms: Nms) -> int:
    """How many candidates count for agreement: all, or up to the first box that ``max_det`` cuts off."""
    return int(kept[nms.max_det]) + 1 if len(kept) > nms.max_det else num_candidates


def corners(xywh: torch.Tensor) -> torch.Tensor:
    """(..., 4) centre and size to xyxy."""
    half = xywh[..., 2:4] / 2
    return torch.cat((xywh[..., :2] - half, xywh[..., :2] + half), -1)


def limit_of(iou: float) -> float:
    """The greatest float32 not above ``iou``: float32 numbers exceed it exactly where they exceed ``iou``."""
    limit = np.float32(iou)
    return float(limit if float(limit) <= iou else np.nextafter(limit, np.float32(-1)))


def _kept(boxes: torch.Tensor, best: torch.Tensor, class_ids: torch.Tensor, iou: float) -> torch.Tensor:
    """Class by class. (Offsetting each class's boxes, to need one call only, would lose their last bits in float32.)"""
    present = class_ids.unique()
    if len(present) == 1:
        return torch.ops.torchvision.nms(boxes, best, iou)
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for class_id in present:
        members = (class_ids == class_id).nonzero().flatten()
        keep[members[torch.ops.torchvision.nms(boxes[members], best[members], iou)]] = True
    return keep.nonzero().flatten()
