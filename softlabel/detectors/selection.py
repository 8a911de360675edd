"""What becomes of a network's output: the boxes that are kept, in pixels of their tiles, with their class vectors."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel import rotated as rotated_math
from softlabel.detectors.batch_nms import Effort, Kept, suppressed_batch
from softlabel.detectors.nms import suppressed
from softlabel.records import Detections, Nms

Image = NDArray[np.uint8]


class Geometry(Protocol):
    """How tiles of one shape are brought to the network's input, and boxes back to the tiles."""

    @property
    def tile_hw(self) -> tuple[int, int]:
        """Height and width of the tiles in pixels."""
        ...

    def apply(self, image: Image) -> Image:
        """A tile as the network takes it."""
        ...

    def apply_to_batch(self, tiles: torch.Tensor) -> torch.Tensor:
        """The same, bit for bit, for (B, H, W, 3) uint8 on a device."""
        ...

    def undo(self, boxes_N4: NDArray[np.float32]) -> NDArray[np.float32]:
        """The network's boxes, xyxy, in tile pixels; they may extend beyond the tile."""
        ...


@dataclass(frozen=True)
class Selection:
    """What is kept for tiles of one shape; tiles whose selections are equal may share a forward pass.

    Attributes:
        geometry: That of the tiles.
        num_classes: How many the network has.
        columns: For each class of the answer, the network's classes that become it; None: they are the same.
        nms: What is kept.
        rotated: Whether the network ends each box with an angle.
    """

    geometry: Geometry
    num_classes: int
    columns: tuple[tuple[int, ...], ...] | None
    nms: Nms
    rotated: bool

    def of_each(self, decoded_BCA: torch.Tensor) -> list[Detections]:
        """Image by image, for a CPU: there, torchvision's NMS is faster than batch NMS."""
        suppress = suppressed
        if self.rotated:
            from softlabel.detectors.rotated_nms import suppressed_rotated as suppress  # imports ultralytics
        decoded_BCA, num_classes = self._mapped(decoded_BCA)
        rows = [suppress(one, num_classes, self.nms) for one in decoded_BCA]
        return self.detections(torch.cat(rows).cpu().numpy(), np.array([len(one) for one in rows]))

    def of_batch(self, decoded_BCA: torch.Tensor, effort: Effort) -> Kept:
        """All images at once, for a device that must not be synchronised with in between."""
        decoded_BCA, num_classes = self._mapped(decoded_BCA)
        return suppressed_batch(decoded_BCA, num_classes, self.nms, effort, rotated=self.rotated)

    def detections(self, rows_NC: NDArray[np.float32], count: NDArray[np.int64]) -> list[Detections]:
        """Each image's, from the rows that were kept, one image's after another's, ``count`` of each.

        An image may have one row more than ``max_det``, which says that there were more.
        """
        image = np.repeat(np.arange(len(count)), count)
        place = np.arange(len(image)) - np.repeat(np.cumsum(count) - count, count)
        is_wanted = place < self.nms.max_det
        rows_NC, image = rows_NC[is_wanted], image[is_wanted]
        height, width = self.geometry.tile_hw
        boxes, xywhr = self.geometry.undo(rows_NC[:, :4]).astype(np.float32), None
        end = 4 + (self.num_classes if self.columns is None else len(self.columns))
        if self.rotated:
            xywhr = rotated_math.upright(boxes)
            xywhr[:, 4] = rows_NC[:, end]
            xywhr = rotated_math.regularized(xywhr).astype(np.float32)
            boxes = rotated_math.hulls(xywhr)
        boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32)).astype(np.float32)
        # A box wholly in the padding has no area in the tile.
        inside = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        has_objectness = rows_NC.shape[1] > end + 1 and not self.rotated
        everything = Detections(
            boxes[inside],
            np.ascontiguousarray(rows_NC[inside, 4:end]),
            objectness=rows_NC[inside, end] if has_objectness else None,
            xywhr=None if xywhr is None else xywhr[inside],
            agreement=rows_NC[inside, -1] if self.nms.iou < 1 else None,
        )
        ends = np.cumsum(np.bincount(image[inside], minlength=len(count)))
        return [
            replace(everything.at(slice(start, stop)), saturated=bool(more))
            for start, stop, more in zip([0, *ends[:-1]], ends, count > self.nms.max_det, strict=True)
        ]

    def _mapped(self, decoded_BCA: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The same boxes, and whatever follows the scores, with scores for the answer's classes, and their number."""
        num_classes, columns = self.num_classes, self.columns
        if columns is None:
            return decoded_BCA, num_classes
        boxes, scores, rest = decoded_BCA.split([4, num_classes, decoded_BCA.shape[1] - 4 - num_classes], dim=1)
        none = torch.zeros_like(scores[:, 0])
        mapped = [scores[:, list(places)].amax(1) if places else none for places in columns]
        return torch.cat((boxes, torch.stack(mapped, 1), rest), 1), len(columns)
