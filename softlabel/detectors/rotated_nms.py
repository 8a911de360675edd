"""NMS of rotated boxes, as ultralytics predicts with it."""

import torch
from ultralytics.utils.metrics import batch_probiou

from softlabel.detectors.nms import MAX_CANDIDATES
from softlabel.records import Nms

_AT_ONCE = 256  # boxes that are compared with all better ones: at most some 300 MB


def suppressed_rotated(decoded: torch.Tensor, num_classes: int, nms: Nms) -> torch.Tensor:
    """What is kept of one image, best first, one more than ``max_det``, class by class of the best class.

    Fast NMS (Bolya et al., arXiv:1904.02689), where whatever scores more suppresses, suppressed itself or not, by
    probabilistic IoU (Llerena et al., arXiv:2106.06072).

    Args:
        decoded: (4 + K + 1, A), boxes as centre and size, and last the angle.
        num_classes: K.
        nms: Floor, IoU and how many.

    Returns:
        (N, 4 + K + 1), boxes as xyxy before they are turned about their centre.
    """
    best, class_ids = decoded[4 : 4 + num_classes].max(0)
    chosen = (best > nms.floor).nonzero().flatten()
    chosen = chosen[best[chosen].argsort(descending=True, stable=True)[:MAX_CANDIDATES]]
    rows, class_ids = decoded[:, chosen].T, class_ids[chosen]
    xywhr = torch.cat((rows[:, :4], rows[:, -1:]), 1)
    kept: list[torch.Tensor] = []
    for first in range(0, len(rows), _AT_ONCE):
        asked = torch.arange(first, min(first + _AT_ONCE, len(rows)), device=rows.device)
        before = torch.arange(int(asked[-1]) + 1, device=rows.device)
        same = (class_ids[before, None] == class_ids[asked]) & (before[:, None] < asked)
        over = (batch_probiou(xywhr[before], xywhr[asked]) > nms.iou) & same
        kept.append(asked[~over.any(0)])
        if sum(map(len, kept)) > nms.max_det:
            break
    rows = rows[torch.cat(kept)[: nms.max_det + 1]] if kept else rows
    half = rows[:, 2:4] / 2
    return torch.cat((rows[:, :2] - half, rows[:, :2] + half, rows[:, 4:]), 1)
