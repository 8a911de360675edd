"""Class-wise greedy NMS of one image's boxes, with the class vectors of what is kept."""

import importlib.util
from pathlib import Path

import torch

from softlabel.records import Nms

MAX_CANDIDATES = 30_000  # of a tile, best first, as ultralytics has it: NMS grows with their square
_CLASS_APART_PX = 7680.0  # classes are moved so far from each other that their boxes never meet


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
    half = rows[:, 2:4] / 2
    boxes = torch.cat((rows[:, :2] - half, rows[:, :2] + half), 1)
    apart = boxes + class_ids[:, None] * _CLASS_APART_PX
    # Worse boxes never decide on better ones: the best few suffice where they leave more than is wanted.
    most = nms.max_det + 1
    tried = most + most // 4
    while len(kept := torch.ops.torchvision.nms(apart[:tried], best[:tried], nms.iou)) < most and tried < len(best):
        tried *= 2
    kept = kept[:most]
    return torch.cat((boxes[kept], rows[kept, 4:]), 1)
