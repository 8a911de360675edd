"""NMS of a whole batch at once, in kernels whose number does not depend on what they find.

Nothing here asks the device for a value: the host need not wait, and the work fits into a CUDA graph. Candidates come
in blocks, best first. A block's are compared with those kept of the blocks before, then with each other. Which of a
block are kept is the one solution of "kept are those that nothing kept and better overlaps"; it is found by applying
that sentence again and again, as Cluster-NMS does (Zheng et al., arXiv:2005.03572), and is reached after as many rounds
as the longest chain of boxes that suppress each other is long.

How many blocks and rounds a batch needs, and room for how many boxes, is known only afterwards: `Kept.effort` says it,
and whoever did less does it again (softlabel.detectors.pipeline). Memory is bounded by the block, whatever the number
of candidates.

Shape suffixes: B images, A anchors, C columns, N candidates of a block, M room for boxes that are kept, P boxes before.
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
    """Blocks of candidates that are looked at, rounds over each, and room for boxes that are kept of an image: what is
    compared with them all would else be compared with max_det, most of which are not there."""

    blocks: int
    rounds: int
    room: int

    def suffices(self, other: "Effort") -> bool:
        """Whether it is no less than another."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def raised_to(self, other: "Effort") -> "Effort":
        """The next powers of two that are no less than either."""
        return Effort(*(max(mine, 1 << math.ceil(math.log2(theirs))) for mine, theirs in zip(self, other, strict=True)))


START = Effort(blocks=2, rounds=8, room=256)


@dataclass(frozen=True)
class Kept:
    """Of a batch, on the device.

    Attributes:
        rows: (B, M, C + 1), of each image as `softlabel.detectors.nms.suppressed` gives them.
        count: (B,) how many of them, from the first on.
        effort: (B, 3) blocks, rounds and room that the image needs; where one was too little the others are guesses.
    """

    rows: torch.Tensor
    count: torch.Tensor
    effort: torch.Tensor


def suppressed_batch(
    decoded_BCA: torch.Tensor, num_classes: int, nms: Nms, effort: Effort, *, rotated: bool = False
) -> Kept:
    """What `softlabel.detectors.nms.suppressed` (or, ``rotated``, that of rotated_nms) keeps of each image.

    Args:
        decoded_BCA: Boxes as centre and size, class scores, and objectness or angle.
        num_classes: Of the class scores.
        nms: Floor, IoU and how many.
        effort: What to do; the answer is right where it suffices for the ``effort`` that comes back.
        rotated: The last column is an angle.
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
    # Where the one after max_det is found, no candidate after it matters.
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
    """The IoU that NMS goes by, and what it is compared with."""
    if not rotated:
        return all_ious, limit_of(nms.iou)
    from softlabel.detectors.rotated_nms import probious  # imports ultralytics

    return probious, nms.iou


def _greedy(
    boxes: torch.Tensor, class_ids: torch.Tensor, alive: torch.Tensor, limit: float, room: int, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates are kept, (B, A), and how many rounds each image needs: one more than were done, if those did
    not suffice. Of more than there is room for the best are right, and the one after them."""
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
    """Those that no kept one overlaps, and whether as many rounds sufficed for that, (B,)."""
    keep = before = alive
    for _ in range(rounds + 1):
        before, keep = keep, alive & ~(over_BNN & keep[:, :, None]).any(1)
    return keep, (keep == before).all(1)


def _fast(
    boxes: torch.Tensor, class_ids: torch.Tensor, alive: torch.Tensor, overlap: Overlap, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_greedy`, of rotated boxes: all that is better suppresses, be it suppressed itself; one round is enough."""
    batch, count = alive.shape
    found = []
    for start in range(0, count, BLOCK):
        block = slice(start, min(start + BLOCK, count))
        before = slice(0, block.stop)
        over = overlap(boxes[:, before], boxes[:, block]) > limit
        over &= class_ids[:, before, None] == class_ids[:, None, block]
        found.append(alive[:, block] & ~over.triu(1 - start).any(1))
    return torch.cat(found, 1), torch.ones(batch, dtype=torch.long, device=alive.device)
