"""The loss that YOLOv5 was trained with: box, objectness and class, on targets assigned by anchor ratio.

Ciolino, Rosario and Noever describe a squared error for the box. YOLOv5 has none: its box loss is 1 - CIoU (Zheng et
al., https://arxiv.org/abs/1911.08287), its objectness and class losses are binary cross-entropies (utils/loss.py and
train.py of YOLOv5 v6.0 to v7.0, https://github.com/ultralytics/yolov5). This is YOLOv5's loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import one_hot
from ultralytics.utils.metrics import bbox_iou, box_iou
from ultralytics.utils.ops import xywh2xyxy

from softlabel.config import HARD, Soft
from softlabel.detectors.background import far_weight, kept_in_regions, trusted
from softlabel.detectors.smoothing import OnlineSmoothing

# Weights of objectness per level, finest first: fine levels have more empty cells. Three levels have their own weights.
_BALANCE_OF_3, _BALANCE = (4.0, 1.0, 0.4), (4.0, 1.0, 0.25, 0.06, 0.02)
_ANCHOR_RATIO = 4.0  # hyp anchor_t: a box matches an anchor whose sides are each below 4 times and above 1/4 of its own
_OBJ_GAIN = 1.0
_NEIGHBOUR = 0.5  # a box also belongs to the two neighbouring cells nearest its centre, at most half a cell from it


@dataclass(frozen=True)
class Assigned:
    """Targets of one level, (N,) each: which target, its image; anchor, row and column of the cell; box (N, 4).

    Boxes are centre (relative to the cell's corner) and size, in cells; anchor sizes (N, 2) in cells.
    """

    target: torch.Tensor
    image: torch.Tensor
    anchor: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    box: torch.Tensor
    anchor_wh: torch.Tensor


def assign(targets_T6: torch.Tensor, anchors_A2: torch.Tensor, height: int, width: int) -> Assigned:
    """Which anchors of which cells answer for which targets on one level.

    A target goes to every anchor whose width and height each differ from its own by a factor below 4, in its own cell
    and in the nearest neighbour to the left or right and above or below (not beyond the image).

    Args:
        targets_T6: Image in the batch, class, and box as centre and size in units of the image (0 to 1).
        anchors_A2: Width and height in cells.
        height: Rows of cells.
        width: Columns of cells.
    """
    gain = targets_T6.new_tensor([1, 1, width, height, width, height])
    in_cells = targets_T6 * gain
    ratio = in_cells[None, :, 4:6] / anchors_A2[:, None]
    fits = torch.maximum(ratio, 1 / ratio).amax(2) < _ANCHOR_RATIO  # (anchors, targets)
    anchor, target = fits.nonzero(as_tuple=True)
    chosen = in_cells[target]
    xy = chosen[:, 2:4]
    from_end = gain[[2, 3]] - xy
    near_start = ((xy % 1 < _NEIGHBOUR) & (xy > 1)).T
    near_end = ((from_end % 1 < _NEIGHBOUR) & (from_end > 1)).T
    here = torch.ones_like(near_start[:1])
    # own cell, left, up, right, down
    shifts = xy.new_tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]) * _NEIGHBOUR
    shift, index = torch.cat((here, near_start, near_end)).nonzero(as_tuple=True)
    chosen, anchor, target = chosen[index], anchor[index], target[index]
    cell = (chosen[:, 2:4] - shifts[shift]).long()
    cell = torch.stack((cell[:, 0].clamp(0, width - 1), cell[:, 1].clamp(0, height - 1)), 1)
    box = torch.cat((chosen[:, 2:4] - cell, chosen[:, 4:6]), 1)
    return Assigned(target, chosen[:, 0].long(), anchor, cell[:, 1], cell[:, 0], box, anchors_A2[anchor])


@dataclass(frozen=True)
class _Objects:
    """What a batch has: targets (T, 6) image, class, box; per target a class vector (T, K), a weight (T,), and one for
    the box loss alone (T,), of which the other weight is a factor."""

    targets: torch.Tensor
    vectors: torch.Tensor
    weights: torch.Tensor
    box_weights: torch.Tensor

    @property
    def class_ids(self) -> torch.Tensor:
        """(T,)"""
        return self.targets[:, 1].long()


class AnchorLoss:
    """YOLOv5's training criterion, called as ultralytics calls its own. softlabel.detectors.soft_loss softens it.

    Args:
        anchors: (levels, anchors, 2) width and height in cells, for levels from fine to coarse.
        num_classes: K; with one class there is no class loss, as in the original.
        box: Gain of the box loss, before scaling: 0.05 in YOLOv5.
        cls: Gain of the class loss, before scaling: 0.5 in YOLOv5.
        imgsz: Side of the model's input in pixels.

    Gains are scaled as YOLOv5's train.py does: box by 3 / levels, class by K / 80 * 3 / levels, objectness by
    (imgsz / 640)^2 * 3 / levels.
    """

    loss_names = ("box_loss", "obj_loss", "cls_loss")

    def __init__(self, anchors: torch.Tensor, num_classes: int, *, box: float, cls: float, imgsz: int) -> None:
        self.num_levels = levels = len(anchors)
        self.soft: Soft = HARD
        self.smoothing: OnlineSmoothing | None = None
        self._anchors, self._num_classes = anchors, num_classes
        self._balance = _BALANCE_OF_3 if levels == 3 else _BALANCE
        self._box = box * 3 / levels
        self._cls = cls * num_classes / 80 * 3 / levels
        self._obj = _OBJ_GAIN * (imgsz / 640) ** 2 * 3 / levels

    def __call__(
        self, preds: dict | tuple[torch.Tensor, dict], batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The three losses of a batch times its size; and the losses without that factor, detached, by name."""
        raw = preds[1] if isinstance(preds, tuple) else preds
        sums, counts = self.terms(raw["feats"], batch)
        losses = (sums / counts.clamp(min=1)).sum(0)
        return losses * len(raw["feats"][0]), dict(zip(self.loss_names, losses.detach(), strict=True))

    def terms(self, feats: Sequence[torch.Tensor], batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums, and what their means divide by, (levels, 3) each: a loss is the sum over levels of these means.

        Args:
            feats: Per level, the head's raw outputs, (B, anchors, height, width, 5 + K).
            batch: ``batch_idx`` (T,), ``cls`` (T, 1) and ``bboxes`` (T, 4), centre and size in units of the image;
                and the keys that softlabel.detectors.soft_loss describes, or none of them.
        """
        objects = self._objects(batch, feats[0].device)
        levels = [
            self._level(i, out.float(), objects, self._background(i, feats, objects, batch))
            for i, out in enumerate(feats)
        ]
        sums, counts = zip(*levels, strict=True)
        return torch.stack(sums), torch.stack(counts)

    def _objects(self, batch: Mapping[str, torch.Tensor], device: torch.device) -> _Objects:
        columns = (batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"])
        targets = torch.cat([column.to(device, torch.float32) for column in columns], 1)
        if "vectors" not in batch:
            vectors = one_hot(targets[:, 1].long(), self._num_classes).to(targets)
            weights = torch.ones_like(targets[:, 0])
            return _Objects(targets, vectors, weights, weights)
        vectors = batch["vectors"].to(targets)
        if self.smoothing:
            vectors = self.smoothing.mixed(vectors, targets[:, 1].long())
        weights = batch["weights"].to(targets)
        return _Objects(targets, vectors, weights, weights * batch["box_weights"].to(targets))

    def _background(
        self, level: int, feats: Sequence[torch.Tensor], objects: _Objects, batch: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | float:
        """How much a level's objectness losses count where there is no object: 1, or (B, anchors, rows, columns).

        Where a region keeps only some classes, it counts by their share in the cell's class scores: if the cell sees an
        object, how likely is it of a class that would have been labelled?
        """
        if "region_idx" not in batch:
            return 1.0
        out = feats[level].detach().float()
        height, width = out.shape[2:4]
        rows, columns = torch.meshgrid(
            torch.arange(height, device=out.device), torch.arange(width, device=out.device), indexing="ij"
        )
        corners = torch.stack((columns, rows), -1).reshape(-1, 2).to(out)
        size_wh = out.new_tensor([width, height])
        least = 2 * width / feats[0].shape[3]  # of the finest cells, as in the assigner of anchor-free models
        kept = kept_in_regions(batch, corners + 0.5, size_wh, least, len(out)).unflatten(1, (height, width))
        if kept.shape[-1] == 1:
            kept = kept[:, None, ..., 0].expand(out.shape[:-1])
        else:
            scores = out[..., 5:].sigmoid()
            kept = (kept[:, None] * scores).sum(-1) / scores.sum(-1).clamp(min=1e-9)
        if "teacher_scores" in batch:
            before = sum(feature[0, ..., 4].numel() for feature in feats[:level])
            objectness = batch["teacher_scores"].to(out)[:, before : before + out[0, ..., 4].numel(), 0]
            by_cell = objectness.view(len(out), -1, height * width).transpose(1, 2)  # the anchors in the classes' place
            weights = trusted(batch, corners + 0.5, size_wh, least, by_cell)
            kept = kept * weights.transpose(1, 2).reshape(out.shape[:-1])
        if self.soft.background_far < 1:
            overlaps = self._overlaps(out, corners, self._anchors[level].to(out), objects.targets)
            kept = kept * far_weight(overlaps, self.soft.background_far)
        return kept

    def _overlaps(
        self, out: torch.Tensor, corners_P2: torch.Tensor, anchors_A2: torch.Tensor, targets_T6: torch.Tensor
    ) -> torch.Tensor:
        """(B, anchors, rows, columns): the greatest IoU of each predicted box with any labelled one in its image."""
        height, width = out.shape[2:4]
        xy = out[..., :2].sigmoid() * 2 - 0.5 + corners_P2.view(height, width, 2)
        wh = (out[..., 2:4].sigmoid() * 2) ** 2 * anchors_A2.view(1, -1, 1, 1, 2)
        predicted = xywh2xyxy(torch.cat((xy, wh), -1).flatten(1, 3))
        labelled = xywh2xyxy(targets_T6[:, 2:] * out.new_tensor([width, height] * 2))
        found = out.new_zeros(predicted.shape[:2])
        for image in targets_T6[:, 0].unique().long().tolist():
            found[image] = box_iou(predicted[image], labelled[targets_T6[:, 0] == image]).amax(1)
        return found.view(out.shape[:-1])

    def _level(
        self, level: int, out: torch.Tensor, objects: _Objects, background: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = out.shape[2:4]
        found = assign(objects.targets, self._anchors[level].to(out), height, width)
        cells = out[found.image, found.anchor, found.row, found.column]
        weights = objects.weights[found.target]
        xy = cells[:, :2].sigmoid() * 2 - 0.5
        wh = (cells[:, 2:4].sigmoid() * 2) ** 2 * found.anchor_wh
        ciou = bbox_iou(torch.cat((xy, wh), 1), found.box, CIoU=True).view(-1)
        box = ((1 - ciou) * objects.box_weights[found.target]).sum() * self._box
        last = _last(out, found)
        has_object = last >= 0
        objectness, counted = torch.zeros_like(out[..., 4]), torch.ones_like(out[..., 4]) * background
        objectness[has_object] = ciou.detach().clamp(min=0)[last[has_object]]
        counted[has_object] = weights[last[has_object]]
        obj = (bce(out[..., 4], objectness, reduction="none") * counted).sum()
        cls = out.new_zeros(())
        if self._num_classes > 1:
            losses = bce(cells[:, 5:], objects.vectors[found.target], reduction="none")
            cls = (losses * weights[:, None]).sum() * self._cls / self._num_classes
            if self.smoothing:
                self.smoothing.see(cells[:, 5:].detach().sigmoid(), objects.class_ids[found.target])
        assigned = len(found.image)
        counts = out.new_tensor([assigned, out[..., 4].numel(), assigned])
        return torch.stack((box, obj * self._obj * self._balance[level], cls)), counts


def _last(out: torch.Tensor, found: Assigned) -> torch.Tensor:
    """Which of the assigned, if any (else -1), gives a cell its objectness: of several in one cell, the last.

    Written so that the last one wins on a GPU too, where writes to the same place have no order.
    """
    shape = out.shape[:-1]
    flat = ((found.image * shape[1] + found.anchor) * shape[2] + found.row) * shape[3] + found.column
    order = torch.arange(len(flat), device=out.device)
    last = torch.full((out[..., 4].numel(),), -1, device=out.device).scatter_reduce(0, flat, order, "amax")
    return last.view(shape)
