"""Letterboxing, as ultralytics does it: a tile keeps its aspect ratio, and grey fills the rest of the input."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.detectors.resize import resized
from softlabel.detectors.selection import Image
from softlabel.records import PAD_VALUE


@dataclass(frozen=True)
class Letterbox:
    """Brings tiles of one shape to a YOLO's input, and boxes back.

    Attributes:
        tile_hw: Size of the tiles, in pixels.
        scaled_hw: What they are resized to.
        size_hw: Size of the input, padded with grey all around.
        pad_xy: Padding at the left and at the top.
    """

    tile_hw: tuple[int, int]
    scaled_hw: tuple[int, int]
    size_hw: tuple[int, int]
    pad_xy: tuple[int, int]

    @classmethod
    def of(cls, tile_hw: tuple[int, int], imgsz: int, stride: int) -> "Letterbox":
        """One that scales the longer side to ``imgsz`` and pads to multiples of the stride."""
        height, width = tile_hw
        gain = imgsz / max(height, width)
        scaled_h, scaled_w = max(1, round(height * gain)), max(1, round(width * gain))
        size_h, size_w = (-(-side // stride) * stride for side in (scaled_h, scaled_w))
        pad = (size_w - scaled_w) // 2, (size_h - scaled_h) // 2
        return cls((height, width), (scaled_h, scaled_w), (size_h, size_w), pad)

    def padded_to(self, size_hw: tuple[int, int]) -> "Letterbox":
        """The same scale in an input of another size."""
        pad = (size_hw[1] - self.scaled_hw[1]) // 2, (size_hw[0] - self.scaled_hw[0]) // 2
        return replace(self, size_hw=size_hw, pad_xy=pad)

    def apply(self, image: Image) -> Image:
        """A tile as the network takes it."""
        if self.scaled_hw != self.tile_hw:
            image = cv2.resize(image, self.scaled_hw[::-1], interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
        if self.scaled_hw == self.size_hw:
            return image
        (x, y), (height, width) = self.pad_xy, self.scaled_hw
        canvas = np.full((*self.size_hw, 3), PAD_VALUE, np.uint8)
        canvas[y : y + height, x : x + width] = image
        return canvas

    def apply_to_batch(self, tiles: torch.Tensor) -> torch.Tensor:
        """The same for (B, H, W, 3) uint8, on their own device."""
        scaled = resized(tiles, self.scaled_hw)
        if self.scaled_hw == self.size_hw:
            return scaled
        (x, y), (height, width) = self.pad_xy, self.scaled_hw
        canvas = tiles.new_full((len(tiles), *self.size_hw, 3), PAD_VALUE)
        canvas[:, y : y + height, x : x + width] = scaled
        return canvas

    def undo(self, boxes_N4: NDArray[np.float32]) -> NDArray[np.float32]:
        """The network's boxes, xyxy, in tile pixels."""
        return (boxes_N4 - np.array(self.pad_xy * 2, np.float32)) / self.scale_4

    @property
    def scale_4(self) -> NDArray[np.float32]:
        """Scale factors for xyxy: one per side, since the scaled sides are rounded."""
        (height, width), (scaled_h, scaled_w) = self.tile_hw, self.scaled_hw
        return np.array([scaled_w / width, scaled_h / height] * 2, np.float32)
