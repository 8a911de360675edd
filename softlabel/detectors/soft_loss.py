"""A model's own training loss, softened: class vectors as targets, weighted boxes, background that counts less.

A batch's keys beyond ultralytics' own are made by softlabel.training.soft: ``vectors`` (T, K), ``weights`` and
``box_weights`` (T,) of its objects, and the regions that softlabel.detectors.background reads. Where a teacher labels
during training, softlabel.training.soft_teacher adds its ``teacher_scores``, (B, A, K) at each anchor point, or with
anchors one objectness per anchor of each cell. Objects are assigned as by ultralytics' assigner or YOLOv5's anchors; of
an object's losses

- the class loss compares with its vector, times the alignment score, where the stock loss has the one-hot of its class
  times that,
- box, class, objectness, DFL and angle losses are multiplied by its weight,
- box, DFL and angle losses also by its box weight,

and background's class loss (objectness with anchors) is multiplied by the share that counts there. The sums are divided
by what the stock loss divides them by, so that an object of weight 0.5 counts half of what it would. With one-hot
vectors, weights and box weights of 1 and no regions nothing changes.

Shape suffixes: B images, A anchor points, N objects of the fullest image, K classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from ultralytics.utils.metrics import batch_probiou, box_iou

from softlabel.config import Soft
from softlabel.detectors.background import far_weight, kept_in_regions, trusted
from softlabel.detectors.smoothing import OnlineSmoothing
from softlabel.detectors.yolov5_loss import AnchorLoss


def soften(criterion: Any, soft: Soft, smoothing: OnlineSmoothing | None) -> None:
    """Soften a model's criterion, as ``init_criterion`` made it, in place.

    Args:
        criterion: ultralytics' for anchor-free models, upright or rotated, with one head or two; or AnchorLoss.
        soft: What to make of unsure labels.
        smoothing: What mixes class targets with the student's own predictions, if anything.
    """
    if isinstance(criterion, AnchorLoss):
        criterion.soft, criterion.smoothing = soft, smoothing
        return
    heads = [criterion.one2many, criterion.one2one] if hasattr(criterion, "one2many") else [criterion]
    for head in heads:
        _SoftHead(head, soft, smoothing)


class _SoftHead:
    """Softens the loss of one anchor-free head by hooking what it calls: assigner, class loss, box and angle loss."""

    def __init__(self, criterion: Any, soft: Soft, smoothing: OnlineSmoothing | None) -> None:
        self._criterion, self._soft, self._smoothing = criterion, soft, smoothing
        self._stock_loss: Callable[..., Any] = criterion.loss
        criterion.loss = self._loss
        criterion.assigner.register_forward_hook(self._after_assigner)
        criterion.bce.register_forward_pre_hook(self._class_targets)
        criterion.bce.register_forward_hook(self._weighted_classes)
        criterion.bbox_loss.register_forward_pre_hook(self._weighted_boxes)
        if hasattr(criterion, "calculate_angle_loss"):
            self._stock_angle_loss: Callable[..., Any] = criterion.calculate_angle_loss
            criterion.calculate_angle_loss = self._weighted_angles

    def _loss(self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> Any:
        features = preds["feats"][0]
        self._size_wh = torch.tensor(features.shape[:1:-1]) * self._criterion.stride[0].cpu()
        batch = self._without_tiny(batch)
        num_images = len(features)
        class_ids = batch["cls"].view(-1).long()
        vectors = batch["vectors"]
        if self._smoothing:
            vectors = self._smoothing.mixed(vectors, class_ids)
        self._batch = batch
        self._vectors_BNK = _padded(batch["batch_idx"], vectors, num_images)
        weights = torch.stack((batch["weights"], batch["weights"] * batch["box_weights"]), 1)
        self._weights_BN2 = _padded(batch["batch_idx"], weights, num_images)
        return self._stock_loss(preds, batch)

    def _without_tiny(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Leave out rotated boxes with a side below 2 px, as v8OBBLoss does before it numbers them."""
        boxes = batch["bboxes"]
        if boxes.shape[1] != 5:
            return batch
        sizes = boxes[:, 2:4].mul(self._size_wh.to(boxes))
        kept = (sizes >= 2).all(1)
        per_object = ("batch_idx", "cls", "bboxes", "vectors", "weights", "box_weights")
        return {**batch, **{key: batch[key][kept] for key in per_object}}

    def _after_assigner(self, _module: nn.Module, inputs: tuple, outputs: tuple) -> None:
        _, predicted, points, labels_BN1, boxes_BN, mask_BN1 = inputs
        _, _, scores_BAK, self._is_object, index_BA = outputs
        self._alignment = scores_BAK.sum(-1, keepdim=True)
        least = self._criterion.assigner.stride_val
        background = kept_in_regions(self._batch, points, self._size_wh, least, len(index_BA))
        if "teacher_scores" in self._batch:
            scores = self._batch["teacher_scores"].to(background)
            background = background * trusted(self._batch, points, self._size_wh, least, scores)
        if self._soft.background_far < 1:
            overlaps_BA = _overlaps(predicted, boxes_BN, mask_BN1)
            background = background * far_weight(overlaps_BA, self._soft.background_far)[..., None]
        if not labels_BN1.shape[1]:  # no object in the batch
            self._targets, self._box_weights_BA = scores_BAK, torch.ones_like(self._alignment[..., 0])
            self._factors, self._labels = background, torch.zeros_like(index_BA, dtype=torch.long)
            return
        index_BA = index_BA.long()
        image = torch.arange(len(index_BA), device=index_BA.device)[:, None]
        self._labels = labels_BN1[image, index_BA, 0].long()
        self._targets = self._vectors_BNK.to(scores_BAK)[image, index_BA] * self._alignment
        weights_BA, self._box_weights_BA = self._weights_BN2.to(scores_BAK)[image, index_BA].unbind(-1)
        self._factors = torch.where(self._is_object[..., None], weights_BA[..., None], background)

    def _class_targets(self, _module: nn.Module, inputs: tuple) -> tuple:
        logits, hard = inputs
        if self._smoothing:
            found = self._is_object
            self._smoothing.see(logits.detach()[found].float().sigmoid(), self._labels[found])
        return logits, self._targets.to(hard)

    def _weighted_classes(self, _module: nn.Module, _inputs: tuple, losses: torch.Tensor) -> torch.Tensor:
        return losses * self._factors

    def _weighted_boxes(self, _module: nn.Module, inputs: tuple) -> tuple:
        *before, scores_BAK, scores_sum, is_object, size, stride = inputs
        return *before, scores_BAK * self._box_weights_BA[..., None], scores_sum, is_object, size, stride

    def _weighted_angles(
        self, predicted: torch.Tensor, boxes: torch.Tensor, is_object: torch.Tensor, weight: torch.Tensor, *more: Any
    ) -> torch.Tensor:
        return self._stock_angle_loss(predicted, boxes, is_object, weight * self._box_weights_BA[is_object], *more)


def _padded(batch_idx: torch.Tensor, values: torch.Tensor, num_images: int) -> torch.Tensor:
    """Rows of a batch (T, ...), images in order, as (B, N, ...), placed as ultralytics' ``preprocess`` places boxes."""
    images = batch_idx.view(-1).long()
    counts = images.bincount(minlength=num_images)
    starts = counts.cumsum(0) - counts
    padded = values.new_zeros(num_images, int(counts.max()), *values.shape[1:])
    padded[images, torch.arange(len(images), device=images.device) - starts[images]] = values
    return padded


def _overlaps(predicted: torch.Tensor, boxes_BN: torch.Tensor, mask_BN1: torch.Tensor) -> torch.Tensor:
    """(B, A): the greatest overlap of each predicted box with any labelled one in its image."""
    iou = batch_probiou if predicted.shape[-1] == 5 else box_iou
    found = torch.zeros_like(predicted[..., 0])
    for image, mask_N1 in enumerate(mask_BN1):
        there = boxes_BN[image][mask_N1[:, 0].bool()]
        if len(there):
            found[image] = iou(predicted[image].float(), there.float()).amax(1).to(found)
    return found
