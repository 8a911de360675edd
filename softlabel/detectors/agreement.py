"""How well the candidates of one object agreed on its box: what NMS throws away says how sure the box is.

An adaptation of two ideas. Soft Teacher (Xu et al., arXiv:2106.09018) jitters a teacher's box, lets the teacher regress
it anew and takes the spread of the answers as the box's unreliability; here the candidates that neighbouring anchors
gave in the same forward pass stand in for the jittered ones, which needs no extra pass. Localisation distillation
(Zheng et al., arXiv:2102.12252) has a student learn boxes according to how sure its teacher is of them; here that is
one weight per box (``train.soft.localisation_power``), not a distribution per edge.

A kept box's agreement is the mean of the IoUs that other candidates of its best class have with it, weighted by their
best scores. Only candidates whose IoU is above NMS's threshold count, as they show the same object, whether this box
suppressed them or another did: one that overlaps two kept boxes counts for both. So the order of candidates does not
matter. Candidates are those that NMS looks at: above the floor, among the best ``MAX_CANDIDATES``, and where
``max_det`` cuts, no worse than the first box that it cuts off.

Shape suffixes: B images, A candidates best first, M kept boxes, P and N boxes; Q pairs of a kept box and another.
"""

from collections.abc import Callable

import torch

Overlap = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(B, P, N) IoU of boxes (B, P, ...) with boxes (B, N, ...)."""
_AT_ONCE = 2048  # candidates that are compared with all kept boxes at a time: at most 8 MB a matrix
_MOST_PAIRS = 1 << 19


def agreement(
    boxes_BA: torch.Tensor,
    class_ids_BA: torch.Tensor,
    best_BA: torch.Tensor,
    places_BM: torch.Tensor,
    overlap: Overlap,
    limit: float,
    at_once: int,
) -> torch.Tensor:
    """(B, M) in (limit, 1], NaN where no other candidate overlaps a box by more than ``limit``.

    Args:
        boxes_BA: (B, A, 4) or (B, A, 5), as ``overlap`` takes them.
        class_ids_BA: Best classes; there may be more of them than boxes: the surplus does not count.
        best_BA: Best scores, of which there may be more too; 0 or below for what does not count.
        places_BM: Which candidates were kept.
        overlap: The IoU that NMS used.
        limit: Only IoUs above it count.
        at_once: Candidates that are compared with all kept boxes at a time.
    """
    best_BA = best_BA.clamp(min=0)
    kept = boxes_BA.gather(1, places_BM[..., None].expand(-1, -1, boxes_BA.shape[-1]))
    kept_ids = class_ids_BA.gather(1, places_BM)[..., None]
    numbers_A = torch.arange(boxes_BA.shape[1], device=boxes_BA.device)
    total = weights = best_BA.new_zeros(places_BM.shape)
    if limit < 1:  # otherwise no IoU is above it
        for start in range(0, len(numbers_A), at_once):
            some = slice(start, min(start + at_once, len(numbers_A)))
            iou = overlap(kept, boxes_BA[:, some])
            counts = (iou > limit) & (kept_ids == class_ids_BA[:, None, some])
            counts &= places_BM[..., None] != numbers_A[some]
            best = best_BA[:, some, None]
            total = total + (iou.where(counts, 0) @ best)[..., 0]
            weights = weights + (counts.to(best) @ best)[..., 0]
    return (total / weights).clamp(max=1)


def agreement_upright(
    boxes_A4: torch.Tensor, class_ids_A: torch.Tensor, best_A: torch.Tensor, kept_M: torch.Tensor, limit: float
) -> torch.Tensor:
    """(M,), as `agreement` for one image, but comparing a tenth of the pairs: on a CPU the comparisons are the cost.

    Args:
        boxes_A4: xyxy.
        class_ids_A: Best classes.
        best_A: Best scores, above 0.
        kept_M: Which candidates were kept.
        limit: Only IoUs above it count.
    """
    pairs = _near(boxes_A4, class_ids_A, kept_M, limit) if 0 < limit < 1 else None
    if pairs is None:
        one = (boxes_A4[None], class_ids_A[None], best_A[None], kept_M[None])
        return agreement(*one, all_ious, limit, _AT_ONCE)[0]
    owner_Q, other_Q = pairs
    iou_Q = ious(boxes_A4[kept_M[owner_Q]], boxes_A4[other_Q])
    counted = ((iou_Q > limit) & (kept_M[owner_Q] != other_Q)).nonzero().flatten()
    owner, best = owner_Q[counted], best_A[other_Q[counted]]
    total = best_A.new_zeros(len(kept_M)).index_add(0, owner, iou_Q[counted] * best)
    weights = best_A.new_zeros(len(kept_M)).index_add(0, owner, best)
    return (total / weights).clamp(max=1)


def _near(
    boxes_A4: torch.Tensor, class_ids_A: torch.Tensor, kept_M: torch.Tensor, limit: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(Q,) indices into the kept and (Q,) candidates of the same class: all pairs whose IoU may be above a limit, and
    some others; None if they are too many.

    If two boxes have a greater IoU and one is w wide, the other's left edge is less than w / limit - w to the left of
    the first's and less than w - w * limit to the right. (Classes are laid out one after another, too far apart to
    meet; a thousandth of w allows for rounding.)
    """
    left, right = boxes_A4[:, 0:3:2].double().nan_to_num(0).clamp(-1e6, 1e6).unbind(1)
    width = (right - left).clamp(min=0)
    apart = left.max() - left.min() + 2 * width.max() / limit + 1 if len(left) else 0
    left = left + class_ids_A * apart
    line, order = left.sort()
    left, width = left[kept_M], width[kept_M]
    first = torch.searchsorted(line, left - width * (1 / limit - 0.999))
    count = torch.searchsorted(line, left + width * (1.001 - limit), right=True) - first
    if count.sum() > _MOST_PAIRS:
        return None
    owner = torch.arange(len(kept_M), device=count.device).repeat_interleave(count)
    place = torch.arange(len(owner), device=count.device) + (first - count.cumsum(0) + count)[owner]
    return owner, order[place]


def ious(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """IoU of boxes as xyxy, each (..., 4), computed as torchvision does; NaN for two without area."""
    x0, y0, x1, y1 = first.unbind(-1)
    u0, v0, u1, v1 = second.unbind(-1)
    inter = (x1.minimum(u1) - x0.maximum(u0)).clamp(min=0) * (y1.minimum(v1) - y0.maximum(v0)).clamp(min=0)
    return inter / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - inter)


def all_ious(first_BP4: torch.Tensor, second_BN4: torch.Tensor) -> torch.Tensor:
    """(B, P, N) IoU of all with all, in each image."""
    return ious(first_BP4[:, :, None], second_BN4[:, None])
