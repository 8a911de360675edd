"""NMS of a whole batch at once, in kernels whose number does not depend on what they find.

Nothing here asks the device for a value: the host need not wait, and the work fits into a CUDA graph. Candidates come
in blocks, best first. A block's are compared with those kept from earlier blocks, then with each other. Which of a
block are kept is the unique solution of "kept are those that no better kept box overlaps"; it is found by applying
that rule repeatedly, as Cluster-NMS does (Zheng et al., arXiv:2005.03572), and is reached after as many rounds as the
longest chain of boxes that suppress each other is long.

How many blocks and rounds a batch needs, and room for how many boxes, is known only afterwards: `Kept.effort` says so,
and a caller that did less runs it again (softlabel.detectors.pipeline). Memory is bounded by the block, whatever the
number of candidates.

Shape suffixes: B images, A anchors, C columns, N candidates of a block, M room for kept boxes, P earlier boxes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from softlabel.detectors.agreement import Overlap, agreement, all_ious
from softlabel.detectors.nms import MAX_CANDIDATES, corners, limit_of
from softlabel.records import Nms

BLOCK = 256


class Effort(NamedTuple):
    """Blocks of candidates to look at, rounds over each, and room for the boxes kept of an image: without that limit
    all comparisons with them would be with ``max_det`` boxes, most of them absent."""

    blocks: int
    rounds: int
    room: int

    def suffices(self, other: "Effort") -> bool:
        """Whether it is at least another in every part."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def raised_to(self, other: "Effort") -> "Effort":
        """This effort, with each part that falls short of another's raised to the next power of two that suffices."""
        return Effort(*(max(mine, 1 << math.ceil(math.log2(theirs))) for mine, theirs in zip(self, other, strict=True)))


START = Effort(blocks=2, rounds=8, room=256)


@dataclass(frozen=True)
class Kept:
    """What is kept of a batch, on the device.

    Attributes:
        rows: (B, M, C + 1), for each image as `softlabel.detectors.nms.suppressed` gives them.
        count: (B,) how many of them are valid, from the first on.
        effort: (B, 3) blocks, rounds and room that the image needs; where one was too little, the others are guesses.
    """

    rows: torch.Tensor
    count: torch.Tensor
    effort: torch.Tensor


def suppressed_batch(
    decoded_BCA: torch.Tensor, num_classes: int, nms: Nms, effort: Effort, *, rotated: bool = False
) -> Kept:
    """What `softlabel.detectors.nms.suppressed` (if ``rotated``, `rotated_nms.suppressed_rotated`) keeps of each image.

    Args:
        decoded_BCA: Boxes as centre and size, class scores, and objectness or angle.
        num_classes: How many class scores there are.
        nms: Floor, IoU and ``max_det``.
        effort: How much to do; the result is right where it suffices for the ``effort`` that is returned.
        rotated: Whether the last column is an angle.
    """
    best, class_ids = decoded_BCA[:, 4 : 4 + num_classes].max(1)
    best, order = best.masked_fill(~(best > nms.floor), -1).sort(dim=1, descending=True, stable=True)
    order, best = order[:, :MAX_CANDIDATES], best[:, :MAX_CANDIDATES]
    num_candidates = (best > nms.floor).sum(1)
    first = min(effort.blocks * BLOCK, order.shape[1])
    order, alive, class_ids = order[:, :first], best[:, :first] > nms.floor, class_ids.gather(1, order[:, :first])
    columns = [0, 1, 2, 3, decoded_BCA.shape[1] - 1] if rotated else [0, 1, 2, 3]
    boxes = torch.stack([decoded_BCA[:, column].gather(1, order) for column in columns], -1)
    most = nms.max_det + 1
    room = min(effort.room, most)
    overlap, limit = _overlap(nms, rotated=rotated)
    if rotated:
        keep, rounds = _fast(boxes, class_ids, alive, overlap, limit)
    else:
        boxes = corners(boxes)
        keep, rounds = _greedy(boxes, class_ids, alive, limit, room, effort.rounds)
    num_kept = keep.cumsum(1)
    # Once the first one beyond max_det is found, no candidate after it matters.
    blocks = torch.where(num_kept[:, -1] >= most, 1, (num_candidates + BLOCK - 1) // BLOCK)
    count = num_kept[:, -1].clamp(max=most)
    seen = num_kept - keep.long() < most
    slots = torch.where(keep & (num_kept <= room), num_kept - 1, room)
    numbers = torch.arange(first, device=order.device).expand_as(order)
    places = order.new_zeros(len(order), room + 1).scatter(1, slots, numbers)[:, :room]
    agreed = agreement(boxes, class_ids, best[:, :first] * seen, places, overlap, limit, BLOCK)
    index = order.gather(1, places)
    rows = decoded_BCA.gather(2, index[:, None].expand(-1, decoded_BCA.shape[1], -1)).transpose(1, 2)
    rows = torch.cat((corners(rows[..., :4]), rows[..., 4:], agreed[..., None]), -1)
    return Kept(rows, count, torch.stack((blocks, rounds, count), 1))


def _overlap(nms: Nms, *, rotated: bool) -> tuple[Overlap, float]:
    """The IoU that NMS uses, and the limit that it is compared with."""
    if not rotated:
        return all_ious, limit_of(nms.iou)
    from softlabel.detectors.rotated_nms import probious  # imports ultralytics

    return probious, nms.iou


def _greedy(
    boxes: torch.Tensor, class_ids: torch.Tensor, alive: torch.Tensor, limit: float, room: int, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates are kept, (B, A), and the rounds each image needs: 1 where those done sufficed, else one more
    than those. If more are kept than there is room for, the best that fit are right, and the next one after them."""
    batch, count = alive.shape
    found, needed = [], torch.ones(batch, dtype=torch.long, device=boxes.device)
    kept_boxes = boxes.new_zeros(batch, room + 1, 4)
    kept_ids = class_ids.new_full((batch, room + 1), -1)
    num_kept = torch.zeros(batch, 1, dtype=torch.long, device=boxes.device)
    for start in range(0, count, BLOCK):
        block, ids = boxes[:, start : start + BLOCK], class_ids[:, start : start + BLOCK]
        keep = alive[:, start : start + BLOCK]
        if start:
            before = min(start, room)
            over = (all_ious(kept_boxes[:, :before], block) > limit) & (kept_ids[:, :before, None] == ids[:, None])
            keep = keep & ~over.any(1)
        over = ((all_ious(block, block) > limit) & (ids[:, :, None] == ids[:, None])).triu(1)
        keep, done = _solve(over, keep, rounds)
        needed = torch.where(done, needed, rounds + 1)
        place = num_kept + keep.cumsum(1) - 1
        slots = torch.where(keep & (place < room), place, room)
        kept_boxes = kept_boxes.scatter(1, slots[..., None].expand(-1, -1, 4), block)
        kept_ids = kept_ids.scatter(1, slots, ids)
        kept_ids[:, room] = -1
        num_kept = (num_kept + keep.sum(1, keepdim=True)).clamp(max=room)
        found.append(keep)
    return torch.cat(found, 1), needed


def _solve(over_BNN: torch.Tensor, alive: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Those that no better kept one overlaps, and whether so many rounds sufficed to find them, (B,)."""
    keep = before = alive
    for _ in range(rounds + 1):
        before, keep = keep, alive & ~(over_BNN & keep[:, :, None]).any(1)
    return keep, (keep == before).all(1)


def _fast(
    boxes: torch.Tensor, class_ids: torch.Tensor, alive: torch.Tensor, overlap: Overlap, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_greedy`, for rotated boxes: any better box suppresses, even if itself suppressed; one round is enough."""
    batch, count = alive.shape
    found = []
    for start in range(0, count, BLOCK):
        block = slice(start, min(start + BLOCK, count))
        before = slice(0, block.stop)
        over = overlap(boxes[:, before], boxes[:, block]) > limit
        over &= class_ids[:, before, None] == class_ids[:, None, block]
        found.append(alive[:, block] & ~over.triu(1 - start).any(1))
    return torch.cat(found, 1), torch.ones(batch, dtype=torch.long, device=alive.device)
