"""Training tiles as an ultralytics dataset: its augmentation, our pixels and boxes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from ultralytics.data.dataset import YOLODataset

from softlabel import rotated
from softlabel.training.targets import Target


class TileDataset(YOLODataset):
    """A YOLODataset whose images are windows of scenes and whose labels come from a list, not from files.

    ``read`` gives the pixels of a tile row, uint8 (H, W, 3) RGB. Under ultralytics' task ``obb`` boxes are rotated.
    """

    def __init__(self, targets: Sequence[Target], read: Callable[[dict], NDArray[np.uint8]], **kwargs: object) -> None:
        self._targets = list(targets)
        self._read = read
        super().__init__(img_path="", **kwargs)

    def get_img_files(self, img_path: str) -> list[str]:
        """Tile ids, where ultralytics would list files; ``fraction`` has no meaning here."""
        return [target.tile["tile_id"] for target in self._targets]

    def get_labels(self) -> list[dict]:
        """Labels as ultralytics holds them: normalised xywh, classes as a float column; corners of rotated boxes."""
        return [_label(target, rotated_boxes=self.use_obb) for target in self._targets]

    def load_image(
        self, i: int, rect_mode: bool = True, resize_short: bool = False
    ) -> tuple[NDArray[np.uint8], tuple[int, int], tuple[int, int]]:
        """Pixels of a tile as BGR, its longer side scaled to imgsz, with ultralytics' mosaic buffer kept up."""
        if self.ims[i] is not None:
            return self.ims[i], self.im_hw0[i], self.im_hw[i]
        target = self._targets[i]
        image = np.ascontiguousarray(target.hide_unknown(self._read(target.tile))[..., ::-1])
        original_hw = image.shape[:2]
        gain = self.imgsz / max(original_hw)
        if gain != 1:
            width, height = (min(round(side * gain), self.imgsz) for side in original_hw[::-1])
            resized = cv2.resize(image, (max(width, 1), max(height, 1)), interpolation=cv2.INTER_LINEAR)
            image = resized.astype(np.uint8, copy=False)
        if self.augment and self.cache != "ram":
            self._buffer_for_mosaic(i, image, original_hw)
        return image, original_hw, image.shape[:2]

    def _buffer_for_mosaic(self, i: int, image: NDArray[np.uint8], original_hw: tuple[int, int]) -> None:
        self.ims[i], self.im_hw0[i], self.im_hw[i] = image, original_hw, image.shape[:2]
        self.buffer.append(i)
        if 1 < len(self.buffer) >= self.max_buffer_length:
            j = self.buffer.pop(0)
            self.ims[j] = self.im_hw0[j] = self.im_hw[j] = None

    def cache_images(self) -> None:
        """Cache one by one: ultralytics uses threads here, and a GDAL handle must not be shared between threads."""
        for i in range(self.ni):
            self.ims[i], self.im_hw0[i], self.im_hw[i] = self.load_image(i)

    def check_cache_disk(self, safety_margin: float = 0.1) -> bool:
        """Never: it would write beside the scenes, under the names of tiles. ``cache=ram`` does work."""
        self.cache = None
        return False


def _label(target: Target, *, rotated_boxes: bool) -> dict:
    _, _, width, height = target.tile["window"]
    boxes = target.boxes.astype(np.float32)
    xywh = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    return {
        "im_file": str(Path(target.tile["tile_id"])),
        "shape": (height, width),
        "cls": target.class_ids.astype(np.float32).reshape(-1, 1),
        "bboxes": xywh / np.array([width, height, width, height], np.float32),
        "segments": list(_corners(target) / np.array([width, height], np.float32)) if rotated_boxes else [],
        "keypoints": None,
        "normalized": True,
        "bbox_format": "xywh",
    }


def _corners(target: Target) -> NDArray[np.float32]:
    """(N, 4, 2) in tile pixels."""
    return rotated.corners(rotated.drawn(target.boxes, target.xywhr)).astype(np.float32)
