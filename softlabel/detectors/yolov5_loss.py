"""The loss that YOLOv5 was trained with: box, objectness and class, on targets assigned by anchor ratio.

Ciolino, Rosario and Noever write of a squared error for the box. YOLOv5 has none: its box loss is 1 - CIoU (Zheng et
al., https://arxiv.org/abs/1911.08287), its objectness and class losses are binary cross-entropies (utils/loss.py and
train.py of YOLOv5 v6.0 to v7.0, https://github.com/ultralytics/yolov5). This is that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from ultralytics.utils.metrics import bbox_iou

# Of objectness on each level, fine ones first: they have more empty cells. Three levels have weights of their own.
_BALANCE_OF_3, _BALANCE = (4.0, 1.0, 0.4), (4.0, 1.0, 0.25, 0.06, 0.02)
_ANCHOR_RATIO = 4.0  # hyp anchor_t: a box matches an anchor whose sides are less than 4 times its own, or a quarter
_OBJ_GAIN = 1.0
_NEIGHBOUR = 0.5  # a box also belongs to the two cells whose centres are nearest, half a cell off at most


@dataclass(frozen=True)
class Assigned:
    """Targets of one level, (N,) each: image, anchor, row and column of the cell; class; box (N, 4).

    Boxes are centre (relative to the cell's corner) and size, in cells; anchor sizes (N, 2) in cells.
    """

    image: torch.Tensor
    anchor: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    class_id: torch.Tensor
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
    chosen, anchor = chosen[index], anchor[index]
    cell = (chosen[:, 2:4] - shifts[shift]).long()
    cell = torch.stack((cell[:, 0].clamp(0, width - 1), cell[:, 1].clamp(0, height - 1)), 1)
    box = torch.cat((chosen[:, 2:4] - cell, chosen[:, 4:6]), 1)
    image, class_id = chosen[:, 0].long(), chosen[:, 1].long()
    return Assigned(image, anchor, cell[:, 1], cell[:, 0], class_id, box, anchors_A2[anchor])


class AnchorLoss:
    """YOLOv5's training criterion, called as ultralytics calls its own.

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
        self._anchors, self._num_classes = anchors, num_classes
        self._balance = _BALANCE_OF_3 if levels == 3 else _BALANCE
        self._box = box * 3 / levels
        self._cls = cls * num_classes / 80 * 3 / levels
        self._obj = _OBJ_GAIN * (imgsz / 640) ** 2 * 3 / levels

    def __call__(
        self, preds: dict | tuple[torch.Tensor, dict], batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The three losses of a batch times its size, and detached without that factor under their names."""
        raw = preds[1] if isinstance(preds, tuple) else preds
        sums, counts = self.terms(raw["feats"], batch)
        losses = (sums / counts.clamp(min=1)).sum(0)
        return losses * len(raw["feats"][0]), dict(zip(self.loss_names, losses.detach(), strict=True))

    def terms(self, feats: Sequence[torch.Tensor], batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums, and what their means divide by, (levels, 3) each: the loss is the sum over levels of these means.

        Args:
            feats: Per level the head's raw outputs, (B, anchors, height, width, 5 + K).
            batch: ``batch_idx`` (T,), ``cls`` (T, 1) and ``bboxes`` (T, 4), centre and size in units of the image.
        """
        device = feats[0].device
        columns = (batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"])
        targets = torch.cat([column.to(device, torch.float32) for column in columns], 1)
        sums, counts = zip(*(self._level(i, out.float(), targets) for i, out in enumerate(feats)), strict=True)
        return torch.stack(sums), torch.stack(counts)

    def _level(self, level: int, out: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = out.shape[2:4]
        found = assign(targets, self._anchors[level].to(out), height, width)
        cells = out[found.image, found.anchor, found.row, found.column]
        xy = cells[:, :2].sigmoid() * 2 - 0.5
        wh = (cells[:, 2:4].sigmoid() * 2) ** 2 * found.anchor_wh
        ciou = bbox_iou(torch.cat((xy, wh), 1), found.box, CIoU=True).view(-1)
        box = (1 - ciou).sum() * self._box
        obj = bce(out[..., 4], _objectness(out, found, ciou.detach()), reduction="sum")
        cls = out.new_zeros(())
        if self._num_classes > 1:
            one_hot = torch.nn.functional.one_hot(found.class_id, self._num_classes).to(out)
            cls = bce(cells[:, 5:], one_hot, reduction="sum") * self._cls / self._num_classes
        assigned = len(found.image)
        counts = out.new_tensor([assigned, out[..., 4].numel(), assigned])
        return torch.stack((box, obj * self._obj * self._balance[level], cls)), counts


def _objectness(out: torch.Tensor, found: Assigned, ciou: torch.Tensor) -> torch.Tensor:
    """The objectness target of every cell: the CIoU there, at least 0. Of several targets on one cell the last counts.

    Written so that the last one wins on a GPU too, where writes to one place have no order.
    """
    shape = out.shape[:-1]
    flat = ((found.image * shape[1] + found.anchor) * shape[2] + found.row) * shape[3] + found.column
    order = torch.arange(len(flat), device=out.device)
    last = torch.full((out[..., 4].numel(),), -1, device=out.device).scatter_reduce(0, flat, order, "amax")
    target = out.new_zeros(last.shape)
    taken = last >= 0
    target[taken] = ciou.clamp(min=0)[last[taken]].to(target.dtype)
    return target.view(shape)
