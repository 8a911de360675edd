"""The loss of single tiles, so that a mean over any split does not depend on how its tiles were batched."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from softlabel.detectors.yolov5_loss import AnchorLoss


class TileLoss:
    """A model's own training criterion, one tile at a time.

    A batch's loss consists of terms, each a sum over the batch divided by a normaliser of the batch (at least 1). With
    the two kept apart, the tiles of a split add up to the loss of that split as one batch, whatever the batch size was.
    """

    def __init__(self, model: nn.Module) -> None:
        criterion: Any = model.init_criterion()  # type: ignore[operator]
        self._terms = _AnchorTerms(criterion) if isinstance(criterion, AnchorLoss) else _AssignerTerms(criterion)

    def names(self) -> list[str]:
        """The loss that each term is part of, without ultralytics' ``_loss`` ending; terms of the same name add up."""
        return self._terms.names

    def __call__(
        self,
        raw: dict,
        index: int,
        boxes_N4: np.ndarray,
        class_ids: np.ndarray,
        size_hw: tuple[int, int],
        angles: np.ndarray | None = None,
    ) -> list[float]:
        """Loss terms of one tile of a forward pass.

        Args:
            raw: The head's raw outputs of a batch.
            index: Which tile of the batch.
            boxes_N4: Its targets, xyxy in pixels of the model's input; for a model that finds rotated boxes, before
                they are turned.
            class_ids: (N,) their classes.
            size_hw: Height and width of the model's input.
            angles: (N,) by which they are turned, as in softlabel.rotated, for a model that finds rotated boxes.

        Returns:
            One sum per term, then one normaliser per term.
        """
        boxes = torch.as_tensor(boxes_N4, dtype=torch.float32).reshape(-1, 4)
        scale = torch.tensor([size_hw[1], size_hw[0]], dtype=torch.float32)
        parts = [(boxes[:, :2] + boxes[:, 2:]) / 2 / scale, (boxes[:, 2:] - boxes[:, :2]) / scale]
        if angles is not None:
            parts.append(torch.as_tensor(angles, dtype=torch.float32).reshape(-1, 1))
        targets = {
            "batch_idx": torch.zeros(len(boxes)),
            "cls": torch.as_tensor(class_ids, dtype=torch.float32).reshape(-1, 1),
            "bboxes": torch.cat(parts, 1),
        }
        sums, normalisers = self._terms.of(raw, slice(index, index + 1), targets)
        return [*sums, *normalisers]


class _AssignerTerms:
    """ultralytics' anchor-free losses: three terms, or four for rotated boxes, all divided by the sum of the assigned
    target scores."""

    def __init__(self, criterion: Any) -> None:
        # End-to-end models (v10, 26) wrap two criteria; detections come from the one-to-many head here.
        self._criterion = getattr(criterion, "one2many", criterion)
        self._normaliser = 0.0
        self._criterion.assigner.register_forward_hook(self._catch_target_scores)
        self.names = [name.removesuffix("_loss") for name in self._criterion.loss_names]

    def _catch_target_scores(self, _module: nn.Module, _inputs: tuple, outputs: tuple) -> None:
        self._normaliser = float(outputs[2].sum())

    def of(self, raw: dict, tile: slice, targets: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
        raw = raw.get("one2many", raw)
        one = {key: raw[key][tile] for key in ("boxes", "scores", "angle") if key in raw}
        one["feats"] = [feature[tile] for feature in raw["feats"]]
        self._normaliser = 0.0
        _, items = self._criterion.loss(one, targets)
        return [float(item) * max(self._normaliser, 1.0) for item in items.values()], [self._normaliser] * len(items)


class _AnchorTerms:
    """YOLOv5's losses: three terms on each level, each with a normaliser of its own."""

    def __init__(self, criterion: AnchorLoss) -> None:
        self._criterion = criterion
        self.names = [name.removesuffix("_loss") for name in criterion.loss_names] * criterion.num_levels

    def of(self, raw: dict, tile: slice, targets: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
        sums, counts = self._criterion.terms([feature[tile] for feature in raw["feats"]], targets)
        return sums.flatten().tolist(), counts.flatten().tolist()


def mean_losses(names: Sequence[str], tile_losses: Sequence[Sequence[float]]) -> dict[str, float]:
    """The losses of many tiles as one batch, from their sums and normalisers; empty without tiles."""
    if not len(tile_losses):
        return {}
    sums, normalisers = np.asarray(tile_losses, np.float64).reshape(-1, 2, len(names)).sum(axis=0)
    losses = dict.fromkeys(names, 0.0)
    for name, term in zip(names, sums / np.maximum(normalisers, 1.0), strict=True):
        losses[name] += float(term)
    return losses
