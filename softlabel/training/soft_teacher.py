"""A student's moving average relabels tiles while the student learns: Xu et al., "End-to-End Semi-Supervised Object
Detection with Soft Teacher" (arXiv:2106.09018), for one-stage models.

As in the paper: the teacher sees a tile weakly augmented, the student sees it strongly augmented; what the teacher
finds above a threshold is an object; background's class loss is weighted by the teacher's own background score; tiles
with truth are mixed in at a set ratio (`train.soft.supplement`).

Unlike the paper: weak augmentation is all of ultralytics' augmentation; strong augmentation also changes colours and
erases pieces (the list of Unbiased Teacher, Liu et al., arXiv:2102.09480), so that boxes need not be mapped from one
view to the other. Weights of background are not scaled to a mean of 1. Boxes are not jittered to see which are reliable
(`train.soft.localisation_power` weighs them by their candidates). The first epochs learn the stored labels.

Shape suffixes: B images, T objects, M regions, P places.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

from softlabel.config import Soft, SoftTeacher
from softlabel.detectors.background import is_inside
from softlabel.detectors.nms import suppressed
from softlabel.detectors.rotated_nms import suppressed_rotated
from softlabel.records import PAD_VALUE, Detections, Nms
from softlabel.training.soft import label_softness

_PER_OBJECT = ("batch_idx", "cls", "bboxes", "weights", "box_weights", "vectors")
_PER_REGION = ("region_idx", "region_bboxes", "region_keeps")
_GREY = PAD_VALUE / 255
_STRONG = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 2.0))], p=0.5),
        v2.RandomErasing(p=0.7, scale=(0.05, 0.2), ratio=(0.3, 3.3), value=_GREY),
        v2.RandomErasing(p=0.5, scale=(0.02, 0.2), ratio=(0.1, 6.0), value=_GREY),
        v2.RandomErasing(p=0.3, scale=(0.02, 0.2), ratio=(0.05, 8.0), value=_GREY),
    ]
)


class Relabeller:
    """Replaces stored labels by those of a student's moving average.

    Args:
        settings: From which epoch on, and above which score something is an object.
        soft: How an object's scores become its targets.
        num_classes: K.
        nms: As in the student's validation; ``settings.threshold`` replaces its floor.
        is_rotated: Whether the student finds rotated boxes.
    """

    def __init__(self, settings: SoftTeacher, soft: Soft, num_classes: int, nms: Nms, *, is_rotated: bool) -> None:
        self._settings, self._soft, self._num_classes = settings, soft, num_classes
        self._nms = Nms(settings.threshold, nms.iou, nms.max_det)
        self._is_rotated = is_rotated

    def begins(self, epochs: int) -> int:
        """The first of ``epochs``, counted from 0, in which it relabels."""
        return math.ceil(self._settings.burn_in * epochs)

    def __call__(self, teacher: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Relabel a batch that `softlabel.training.dataset.looked_up` made, on the student's device.

        Args:
            teacher: The moving average, ready for inference.
            batch: ``img`` (B, 3, H, W) in [0, 1]; ``is_stored`` (T,) and ``region_is_stored`` (M,) say what comes
                from soft labels; a stored region that keeps all background is a part of a tile with soft labels.

        Returns:
            The batch with the images that show soft labels strongly augmented, the objects and regions of truth, what
            the teacher found in tiles with soft labels, and what softlabel.detectors.background.trusted reads.
        """
        images = batch["img"]
        is_part = batch["region_is_stored"] & (batch["region_keeps"] == 1).all(1)
        index, parts = batch["region_idx"][is_part], batch["region_bboxes"][is_part]
        with torch.no_grad(), _one_to_many(teacher):
            decoded = teacher(images)[0].float()
        found = [self._objects(i, decoded[i], parts[index == i], images) for i in range(len(images))]
        merged = {key: batch[key][~batch["is_stored"]] for key in _PER_OBJECT}
        merged = {key: torch.cat([merged[key], *(one[key].to(merged[key]) for one in found)]) for key in merged}
        order = merged["batch_idx"].argsort(stable=True)  # the loss wants the objects of an image together
        end = 4 + self._num_classes
        has_objectness = decoded.shape[1] > end and not self._is_rotated
        return {
            **batch,
            **{key: values[order] for key, values in merged.items()},
            **{key: batch[key][~batch["region_is_stored"]] for key in _PER_REGION},
            "img": _strong(images, index.unique().long()),
            "teacher_idx": index,
            "teacher_bboxes": parts,
            "teacher_scores": (decoded[:, end:] if has_objectness else decoded[:, 4:end]).transpose(1, 2),
        }

    def _objects(
        self, image: int, decoded: torch.Tensor, parts: torch.Tensor, images: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """What the teacher found in an image's tiles with soft labels, under a batch's keys."""
        rows = (suppressed_rotated if self._is_rotated else suppressed)(decoded, self._num_classes, self._nms)
        height, width = images.shape[2:]
        size = rows.new_tensor([width, height] * 2)
        centres = (rows[:, :2] + rows[:, 2:4]) / 2 / size[:2]
        rows = rows[is_inside(centres, parts.to(rows)).any(0)] if len(parts) else rows[:0]
        numbers, end = rows.cpu().numpy(), 4 + self._num_classes
        boxes, scores = numbers[:, :4], numbers[:, 4:end]
        objectness = numbers[:, end] if numbers.shape[1] > end + 1 and not self._is_rotated else None
        found = Detections(boxes, scores, objectness=objectness, agreement=numbers[:, -1])
        everything = np.ones(len(boxes), bool)
        soft = label_softness(found, everything, ~everything, self._num_classes, self._soft, calibrated=False)
        xywh = torch.cat(((rows[:, :2] + rows[:, 2:4]) / 2, rows[:, 2:4] - rows[:, :2]), 1) / size
        return {
            "batch_idx": torch.full((len(rows),), image),
            "cls": torch.from_numpy(found.class_ids)[:, None],
            "bboxes": torch.cat((xywh, rows[:, end : end + 1]), 1) if self._is_rotated else xywh,
            "weights": torch.from_numpy(soft.weights),
            "box_weights": torch.from_numpy(soft.box_weights),
            "vectors": torch.from_numpy(soft.vectors),
        }


def _strong(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The images, with the ``chosen`` ones strongly augmented."""
    augmented = images.clone()
    for i in chosen.tolist():
        augmented[i] = _STRONG(images[i])
    return augmented


@contextmanager
def _one_to_many(model: Any) -> Iterator[None]:
    """YOLOv10 and YOLO26: class vectors and NMS need the one-to-many head, as in labelling."""
    head = model.model[-1]
    before = getattr(head, "end2end", False)
    if before:
        head.end2end = False
    try:
        yield
    finally:
        if before:
            head.end2end = True
