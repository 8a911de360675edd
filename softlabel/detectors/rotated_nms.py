"""NMS of rotated boxes, as ultralytics predicts with it."""

import torch
from ultralytics.utils.metrics import batch_probiou

from softlabel.detectors.agreement import agreement
from softlabel.detectors.nms import MAX_CANDIDATES, num_seen
from softlabel.records import Nms

_AT_ONCE = 256  # boxes that are compared with all better ones at a time: at most some 300 MB


def suppressed_rotated(decoded: torch.Tensor, num_classes: int, nms: Nms) -> torch.Tensor:
    """What is kept of one image: class-wise NMS by best class, best first, at most one more than ``max_det``.

    Fast NMS (Bolya et al., arXiv:1904.02689), where any box that scores higher suppresses, suppressed itself or not, by
    probabilistic IoU (Llerena et al., arXiv:2106.06072).

    Args:
        decoded: (4 + K + 1, A), boxes as centre and size, and the angle last.
        num_classes: K.
        nms: Floor, IoU and ``max_det``.

    Returns:
        (N, 4 + K + 2), boxes as xyxy before they are turned about their centre, and their agreement last
        (softlabel.detectors.agreement).
    """
    best, class_ids = decoded[4 : 4 + num_classes].max(0)
    chosen = (best > nms.floor).nonzero().flatten()
    chosen = chosen[best[chosen].argsort(descending=True, stable=True)[:MAX_CANDIDATES]]
    rows, best, class_ids = decoded[:, chosen].T, best[chosen], class_ids[chosen]
    xywhr = torch.cat((rows[:, :4], rows[:, -1:]), 1)
    found = [chosen[:0]]
    for first in range(0, len(rows), _AT_ONCE):
        asked = torch.arange(first, min(first + _AT_ONCE, len(rows)), device=rows.device)
        before = torch.arange(int(asked[-1]) + 1, device=rows.device)
        same = (class_ids[before, None] == class_ids[asked]) & (before[:, None] < asked)
        over = (batch_probiou(xywhr[before], xywhr[asked]) > nms.iou) & same
        found.append(asked[~over.any(0)])
        if sum(map(len, found)) > nms.max_det:
            break
    kept = torch.cat(found)[: nms.max_det + 1]
    seen = xywhr[None, : num_seen(kept, len(best), nms)]
    agreed = agreement(seen, class_ids[None], best[None], kept[None], probious, nms.iou, _AT_ONCE)
    rows = rows[kept]
    half = rows[:, 2:4] / 2
    return torch.cat((rows[:, :2] - half, rows[:, :2] + half, rows[:, 4:], agreed.T), 1)


def probious(first_BP5: torch.Tensor, second_BN5: torch.Tensor) -> torch.Tensor:
    """(B, P, N) probabilistic IoU.

    Image by image, since ``batch_probiou`` takes two dimensions, and its temporary values are 20 times as large.
    """
    return torch.stack([batch_probiou(first, second) for first, second in zip(first_BP5, second_BN5, strict=True)])
