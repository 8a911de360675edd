"""The loss of single tiles, so that a mean over any split does not depend on how its tiles fell into batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from softlabel.records import Truth


class TileLoss:
    """A model's own training criterion, one tile at a time.

    ultralytics divides a batch's loss by the sum of its assigned target scores (at least 1). Kept apart as sums and
    normaliser, the tiles of a split add up to the loss of that split as one batch, whatever the batch size was.
    """

    def __init__(self, model: nn.Module) -> None:
        criterion: Any = model.init_criterion()  # type: ignore[operator]
        # End-to-end models (v10, 26) wrap two criteria; detections come from the one-to-many head here.
        self._criterion = getattr(criterion, "one2many", criterion)
        self._normaliser = 0.0
        self._criterion.assigner.register_forward_hook(self._catch_target_scores)

    def _catch_target_scores(self, _module: nn.Module, _inputs: tuple, outputs: tuple) -> None:
        self._normaliser = float(outputs[2].sum())

    def names(self) -> list[str]:
        """Loss components in order, without ultralytics' ``_loss`` ending: box, cls, dfl."""
        return [name.removesuffix("_loss") for name in self._criterion.loss_names]

    def __call__(
        self, raw: dict, index: int, boxes_N4: np.ndarray, class_ids: np.ndarray, size_hw: tuple[int, int]
    ) -> list[float]:
        """Loss sums of one tile of a forward pass.

        Args:
            raw: The head's raw outputs of a batch: ``boxes``, ``scores`` (B, C, A) and ``feats``.
            index: Which tile of the batch.
            boxes_N4: Its targets, xyxy in pixels of the model's input.
            class_ids: (N,) their classes.
            size_hw: Height and width of the model's input.

        Returns:
            One sum per component, and last the normaliser.
        """
        raw = raw.get("one2many", raw)
        one = {
            "boxes": raw["boxes"][index : index + 1],
            "scores": raw["scores"][index : index + 1],
            "feats": [feature[index : index + 1] for feature in raw["feats"]],
        }
        boxes = torch.as_tensor(boxes_N4, dtype=torch.float32).reshape(-1, 4)
        scale = torch.tensor([size_hw[1], size_hw[0]], dtype=torch.float32)
        targets = {
            "batch_idx": torch.zeros(len(boxes)),
            "cls": torch.as_tensor(class_ids, dtype=torch.float32).reshape(-1, 1),
            "bboxes": torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2 / scale, (boxes[:, 2:] - boxes[:, :2]) / scale], 1),
        }
        self._normaliser = 0.0
        _, items = self._criterion.loss(one, targets)
        return [float(item) * max(self._normaliser, 1.0) for item in items.values()] + [self._normaliser]


def mean_losses(names: Sequence[str], tile_losses: Sequence[Sequence[float]]) -> dict[str, float]:
    """The loss of many tiles as one batch, from their sums and normalisers; empty without tiles."""
    if not len(tile_losses):
        return {}
    *sums, normaliser = np.asarray(tile_losses, dtype=np.float64).sum(axis=0)
    return {name: float(value / max(normaliser, 1.0)) for name, value in zip(names, sums, strict=True)}


def targets_of(truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and classes that a loss may use: what evaluation ignores, training leaves out."""
    return truth.boxes[~truth.ignore], truth.class_ids[~truth.ignore]
